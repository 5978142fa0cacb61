"""A PCI function's configuration space: what its device answers, and what is answered here.

Each bit is the device's, unless it is emulated; an emulated one is kept here, and the guest can
change it where it is writable (PCI Local Bus spec. 3.0, 6.1).
"""

from __future__ import annotations

from cpr.state.vmstate import VMStateDescription, buffer, i32

HEADER_TYPE = 0x0E
MULTIFUNCTION = 0x80
COMMAND = 0x04
COMMAND_IO, COMMAND_MEMORY = 1, 2
COMMAND_MASTER = 4
COMMAND_PARITY, COMMAND_SERR = 1 << 6, 1 << 8
COMMAND_INTX_DISABLE = 1 << 10
COMMAND_GUESTS = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE
"""The bits that a guest's driver sets; a reset clears them."""
STATUS = 0x06
STATUS_CAPABILITIES = 0x10
BARS = 0x10
BAR_COUNT = 6
ROM_BAR = 0x30
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D

BAR_IO = 1
BAR_MEMORY_64 = 4
BAR_PREFETCH = 8
IO_MASK, MEMORY_MASK = ~3, ~15

CAP_MSI, CAP_MSIX = 0x05, 0x11
MAX_CAPABILITIES = 48

PINS = 4


def vmstate(size: int) -> VMStateDescription:
    """QEMU's PCIDevice, with `size` bytes of configuration space."""
    return VMStateDescription(
        "PCIDevice", 2, 1, (i32("version_id"), buffer("config", size), i32("irq_state", PINS))
    )


class ConfigSpace:
    """The emulated bits of `size` bytes of configuration space, 256 or 4096."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = bytearray(size)
        self.emulated = bytearray(size)
        self._writable = bytearray(size)

    def emulate(self, offset: int, size: int, value: int, emulated: int, writable: int) -> None:
        """Takes the bits of `emulated` over from the device, with this value."""
        for target, source in (
            (self.data, value),
            (self.emulated, emulated),
            (self._writable, writable),
        ):
            target[offset : offset + size] = source.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def merge(self, offset: int, size: int, device: int) -> int:
        """What the guest reads where the device answers `device`."""
        mask = int.from_bytes(self.emulated[offset : offset + size], "little")
        return device & ~mask | self.get(offset, size) & mask

    def write(self, offset: int, size: int, value: int) -> None:
        mask = int.from_bytes(self._writable[offset : offset + size], "little")
        new = self.get(offset, size) & ~mask | value & mask
        self.data[offset : offset + size] = new.to_bytes(size, "little")


class Bar:
    """One base address register, of `size` bytes (a power of two); `wide` takes two registers."""

    __slots__ = ("flags", "index", "is_io", "size", "wide")

    def __init__(self, index: int, size: int, flags: int) -> None:
        self.index = index
        self.size = size
        self.is_io = bool(flags & BAR_IO)
        self.wide = not self.is_io and bool(flags & BAR_MEMORY_64)
        self.flags = flags & (3 if self.is_io else 15)

    @property
    def register(self) -> int:
        return BARS + 4 * self.index

    def emulate(self, config: ConfigSpace) -> None:
        """Makes the register sizable: its low bits read as zeros, whatever is written."""
        width = 8 if self.wide else 4
        every = (1 << 8 * width) - 1
        mask = IO_MASK if self.is_io else MEMORY_MASK
        writable = ~(self.size - 1) & mask & every
        config.emulate(self.register, width, self.flags, every, writable)

    def address(self, config: ConfigSpace, command: int) -> int | None:
        """Where the guest has put it, or None while it is not decoded.

        An address of 0, and one that wraps at the top (as all ones do), are not.
        """
        if not command & (COMMAND_IO if self.is_io else COMMAND_MEMORY):
            return None
        width = 8 if self.wide else 4
        value = config.get(self.register, width)
        base = value & (IO_MASK if self.is_io else MEMORY_MASK)
        limit = 1 << (16 if self.is_io else 8 * width)
        if base == 0 or base + self.size >= limit:
            return None
        return base


def overlaps(offset: int, size: int, start: int, length: int) -> bool:
    """Whether [offset, offset+size) and [start, start+length) have a byte in common."""
    return offset < start + length and start < offset + size
