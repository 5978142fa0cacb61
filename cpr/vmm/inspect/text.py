"""Inspections as text: aligned tables, exact sizes with readable ones beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from uuid import UUID

from cpr.vmm.inspect.cpr_state import State
from cpr.vmm.inspect.items import Item, Stream
from cpr.vmm.inspect.process import Descriptor
from cpr.vmm.inspect.source import Found
from cpr.vmm.inspect.values import Content, Value, is_signed, leaves

WIDTH = 72  # of the values of one field, in characters
BYTES_PER_LINE = 32
PAGES = ("NORMAL PAGES", "ZERO PAGES", "XBZRLE PAGES")
RIGHT = frozenset(
    {"BODY", "FD", "ID", "INODE", "INST", "OFFSET", "SIZE", "USED LENGTH", "VERSION", *PAGES}
)
DESCRIPTOR_COLUMNS = ("INODE", "SIZE", "SEALS", "CLOEXEC", "FILE")


def show(label: str, found: Found, with_fields: bool) -> Iterator[str]:
    """Lines about `found`, which was read from `label`."""
    yield f"{label}: {found.kind or 'unknown'}, {plain_size(len(found.data) - found.offset)}"
    if isinstance(found, State):
        yield from _state(found)
    elif isinstance(found, Stream):
        yield from _stream(found, with_fields)


def show_descriptors(descriptors: list[Descriptor]) -> Iterator[str]:
    rows = [[str(each.fd), *_descriptor(each)] for each in descriptors]
    yield from table(("FD", *DESCRIPTOR_COLUMNS), rows)


def plain_size(size: int) -> str:
    """The size in bytes and, above 1 KiB, in the unit that it is readable in."""
    exact = f"{size} bytes"
    return f"{exact} ({readable(size)})" if size >= 1024 else exact


def readable(size: int) -> str:
    value, unit = float(size), 0
    while value >= 1024 and unit < 4:
        value /= 1024
        unit += 1
    return f"{value:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def safe(line: str) -> str:
    """`line` without characters that a terminal would obey: names in a bad file may be anything."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> Iterator[str]:
    """Lines of cells under their headings; numbers are aligned to the right."""
    lines = [list(columns), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        cells = [
            cell.rjust(width) if name in RIGHT else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def scalar(value: object, kind: str = "") -> str:
    """An unsigned integer in hex, a signed one in decimal, bytes in hex."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if is_signed(kind) else hex(value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _state(state: State) -> Iterator[str]:
    if state.entries:
        yield ""
        known = any(entry.descriptor for entry in state.entries)
        columns = DESCRIPTOR_COLUMNS if known else ()
        rows = []
        for entry in state.entries:
            row = [hex(entry.offset), entry.name, str(entry.id), str(entry.fd)]
            if known:
                row += _descriptor(entry.descriptor)
            rows.append(row)
        yield from table(("OFFSET", "NAME", "ID", "FD", *columns), rows)
    else:
        yield "no descriptors"
    if state.devices:
        yield ""
        yield from table(
            ("OFFSET", "VFIO DEVICE", "DEVID", "IOAS", "HWPT"),
            [
                [hex(each.offset), each.name, str(each.devid), str(each.ioas_id), str(each.hwpt_id)]
                for each in state.devices
            ],
        )


def _stream(found: Stream, with_fields: bool) -> Iterator[str]:
    if found.configuration is not None:
        yield f"machine {found.configuration.machine}"
        yield f"capabilities {', '.join(found.configuration.capabilities) or 'none'}"
        if found.configuration.uuid is not None:
            yield f"uuid {UUID(bytes=found.configuration.uuid)}"
    yield ""
    columns = ("OFFSET", "SIZE", "KIND", "ID", "NAME", "INST", "VERSION", "BODY", "CONTENT")
    yield from table(columns, [_item(item) for item in found.items])
    if found.blocks:
        yield ""
        yield from _blocks(found)
    if with_fields:
        for item in found.items:
            if item.fields:
                yield ""
                yield f"{item.key}, offset {item.offset:#x}"
                yield from _fields(item.fields)


def printable(value: bytes) -> str | None:
    """The text that `value` is, without NULs at its end, or None if it is not one."""
    raw = value.rstrip(b"\0")
    return raw.decode() if raw.isascii() and raw.decode().isprintable() else None


def _descriptor(descriptor: Descriptor | None) -> list[str]:
    if descriptor is None:
        return ["", "", "", "", "not open"]
    seals = "" if descriptor.seals is None else ",".join(descriptor.seals) or "none"
    return [
        str(descriptor.inode),
        f"{descriptor.size} ({readable(descriptor.size)})",
        seals,
        "on" if descriptor.cloexec else "off",
        descriptor.target,
    ]


def _item(item: Item) -> list[str]:
    numbers = (item.section_id, item.instance_id, item.version_id)
    section_id, instance_id, version_id = ("" if n is None else str(n) for n in numbers)
    row = [hex(item.offset), str(item.size), item.kind, section_id, item.name]
    return [*row, instance_id, version_id, str(item.body_size), _content(item)]


def _content(item: Item) -> str:
    if item.pages is not None:
        return f"{item.pages} pages" if item.pages else ""
    if item.fields is not None:
        return f"{sum(1 for _ in leaves(item.fields))} fields"
    return "not described" if item.section_id is not None else ""


def _blocks(found: Stream) -> Iterator[str]:
    rows = []
    for block in found.blocks.values():
        address = "" if block.address is None else hex(block.address)
        size = f"{block.used_length} ({readable(block.used_length)})"
        pages = [str(block.normal), str(block.zero), str(block.xbzrle)]
        rows.append([block.idstr, size, address, *pages])
    yield from table(("RAM BLOCK", "USED LENGTH", "ADDRESS", *PAGES), rows)


def _fields(values: list[Value]) -> Iterator[str]:
    rows = []
    for name, value in leaves(values):
        first, *more = _lines(value.value, value.type)
        rows.append([hex(value.offset), value.type, name, first])
        rows += [["", "", "", line] for line in more]
    yield from table(("OFFSET", "TYPE", "NAME", "VALUE"), rows)


def _lines(value: Content, kind: str) -> list[str]:
    if isinstance(value, bytes):
        return _dump(value)
    if not isinstance(value, list):
        return [scalar(value, kind)]
    lines = [""]
    for each, group in groupby(value):
        count = len(list(group))
        word = scalar(each, kind) + (f" (x{count})" if count > 1 else "")
        if lines[-1] and len(lines[-1]) + len(word) >= WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _dump(value: bytes) -> list[str]:
    """Bytes in hex, a text and its NULs as such; lines alike are said once."""
    text = printable(value)
    if text is not None:
        return [f'"{text}" in {len(value)} bytes' if text else f"{len(value)} zero bytes"]
    begins = range(0, len(value), BYTES_PER_LINE)
    pieces = [value[begin : begin + BYTES_PER_LINE].hex(" ", -4) for begin in begins]
    lines = []
    for piece, group in groupby(pieces):
        count = len(list(group))
        lines.append(piece + (f" (x{count})" if count > 1 else ""))
    return lines
