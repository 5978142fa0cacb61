"""AML, the byte code of ACPI's definition blocks, as far as devices are described in it.

Every function returns the bytes of one object (ACPI 6.5, chapter 20; resources: chapter 6.4).
"""

from __future__ import annotations

ZERO, ONE, NAME, SCOPE, BUFFER, PACKAGE = 0x00, 0x01, 0x08, 0x10, 0x11, 0x12
BYTE, WORD, DWORD, QWORD, STRING = 0x0A, 0x0B, 0x0C, 0x0E, 0x0D
DEVICE = b"\x5b\x82"
DUAL_NAME, MULTI_NAME, ROOT = 0x2E, 0x2F, b"\\"

# Address spaces of resource descriptors, and their general flags.
MEMORY_SPACE, IO_SPACE, BUS_SPACE = 0, 1, 2
FIXED_RANGE = 0x0C  # both ends, and decoded by what produces it
CACHELESS_WRITABLE, ENTIRE_RANGE = 0x01, 0x03
END = b"\x79\x00"


def integer(value: int) -> bytes:
    if value in (0, 1):
        return bytes((ONE if value else ZERO,))
    for prefix, size in ((BYTE, 1), (WORD, 2), (DWORD, 4), (QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit into 64 bits")


def string(text: str) -> bytes:
    return bytes((STRING,)) + text.encode("ascii") + b"\0"


def path(text: str) -> bytes:
    r"""A name string: "_SB", "\_SB.PCI0"."""
    root = ROOT if text.startswith("\\") else b""
    segments = [segment.ljust(4, "_").encode("ascii") for segment in text.lstrip("\\").split(".")]
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + bytes((DUAL_NAME,)) + b"".join(segments)
    return root + bytes((MULTI_NAME, len(segments))) + b"".join(segments)


def _sized(body: bytes) -> bytes:
    """`body` behind its PkgLength, which counts itself too."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,)) + body
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << 4 + 8 * more:
            first = bytes((more << 6 | length & 0xF,))
            return first + (length >> 4).to_bytes(more, "little") + body
    raise ValueError(f"an object of {len(body)} bytes is too large")


def name(text: str, value: bytes) -> bytes:
    return bytes((NAME,)) + path(text) + value


def scope(text: str, *objects: bytes) -> bytes:
    return bytes((SCOPE,)) + _sized(path(text) + b"".join(objects))


def device(text: str, *objects: bytes) -> bytes:
    return DEVICE + _sized(path(text) + b"".join(objects))


def package(*elements: bytes) -> bytes:
    """At most 255 elements."""
    return bytes((PACKAGE,)) + _sized(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return bytes((BUFFER,)) + _sized(integer(len(data)) + data)


def eisa_id(text: str) -> bytes:
    """An id like PNP0501, compressed (ACPI 6.5, 19.3.4, EISAID)."""
    number = int(text[3:], 16)
    for place, letter in enumerate(text[:3]):
        number |= ord(letter) - 0x40 << 26 - 5 * place
    return integer(int.from_bytes(number.to_bytes(4, "big"), "little"))


# Resources.


def resources(*descriptors: bytes) -> bytes:
    """The buffer that _CRS has for a value."""
    return buffer(b"".join(descriptors) + END)


def io_ports(base: int, length: int) -> bytes:
    """Ports at a place that is fixed, all 16 address bits decoded."""
    place = base.to_bytes(2, "little")
    return b"\x47\x01" + place + place + bytes((1, length))


def irq(number: int) -> bytes:
    """An edge-triggered ISA interrupt, not shared."""
    return b"\x22" + (1 << number).to_bytes(2, "little")


def bus_range(first: int, last: int) -> bytes:
    return _address_space(BUS_SPACE, 0, 2, first, last)


def io_range(first: int, last: int) -> bytes:
    return _address_space(IO_SPACE, ENTIRE_RANGE, 2, first, last)


def memory_range(first: int, last: int) -> bytes:
    size = 4 if last < 1 << 32 else 8
    return _address_space(MEMORY_SPACE, CACHELESS_WRITABLE, size, first, last)


def fixed_memory(base: int, length: int) -> bytes:
    """Memory below 4 GiB that is taken."""
    return b"\x86\x09\x00\x01" + base.to_bytes(4, "little") + length.to_bytes(4, "little")


def _address_space(kind: int, flags: int, size: int, first: int, last: int) -> bytes:
    """A range that a bridge passes on; numbers have `size` bytes."""
    tag = {2: 0x88, 4: 0x87, 8: 0x8A}[size]
    values = (0, first, last, 0, last - first + 1)
    body = bytes((kind, FIXED_RANGE, flags))
    body += b"".join(value.to_bytes(size, "little") for value in values)
    return bytes((tag,)) + len(body).to_bytes(2, "little") + body
