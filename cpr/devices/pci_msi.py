"""MSI and MSI-X as the guest sees them: capabilities, the MSI-X table and its pending bits.

PCI Local Bus specification 3.0, 6.8.  A message is (address, data).
"""

from __future__ import annotations

from cpr.devices.pci_config import ConfigSpace
from cpr.state.vmstate import VMStateDescription, buffer

MSI_FLAGS = 2
MSI_ENABLE = 1
MSI_64BIT = 0x80
MSI_MASKING = 0x100
MSI_MULTIPLE_SHIFT = 4  # log2 of the number of vectors that the guest uses
MSI_CAPABLE_SHIFT = 1  # log2 of how many there are

MSIX_FLAGS = 2
MSIX_ENABLE = 0x8000
MSIX_MASK_ALL = 0x4000
MSIX_TABLE_SIZE = 0x7FF  # the number of entries less one
MSIX_TABLE, MSIX_PBA = 4, 8
MSIX_BIR = 7
ENTRY_SIZE = 16
ENTRY_MASKED = 1

_32 = 0xFFFFFFFF


class MsiCapability:
    """The MSI capability at `offset` of `config`, all of it emulated."""

    def __init__(self, config: ConfigSpace, offset: int, flags: int) -> None:
        self._config = config
        self.offset = offset
        self._wide = bool(flags & MSI_64BIT)
        self.masking = bool(flags & MSI_MASKING)
        self.count = 1 << (flags >> MSI_CAPABLE_SHIFT & 7)
        base = flags & (7 << MSI_CAPABLE_SHIFT | MSI_64BIT | MSI_MASKING)
        writable = MSI_ENABLE | 7 << MSI_MULTIPLE_SHIFT
        config.emulate(offset + MSI_FLAGS, 2, base, 0xFFFF, writable)
        config.emulate(offset + 4, 4, 0, _32, _32 & ~3)
        place = offset + 8
        if self._wide:
            config.emulate(place, 4, 0, _32, _32)
            place += 4
        self._data = place
        config.emulate(place, 2, 0, 0xFFFF, 0xFFFF)
        self._mask = place + 4
        if self.masking:
            config.emulate(self._mask, 4, 0, _32, (1 << self.count) - 1)
            config.emulate(self._mask + 4, 4, 0, _32, 0)

    @property
    def size(self) -> int:
        return self._mask + (8 if self.masking else 0) - self.offset

    @property
    def enabled(self) -> bool:
        return bool(self._flags & MSI_ENABLE)

    @property
    def _flags(self) -> int:
        return self._config.get(self.offset + MSI_FLAGS, 2)

    @property
    def used(self) -> int:
        """How many vectors the guest has asked for, at most what there are."""
        return min(1 << (self._flags >> MSI_MULTIPLE_SHIFT & 7), self.count)

    def message(self, vector: int) -> tuple[int, int]:
        address = self._config.get(self.offset + 4, 4)
        if self._wide:
            address |= self._config.get(self.offset + 8, 4) << 32
        data = self._config.get(self._data, 2)
        return address, data & ~(self.used - 1) | vector

    def is_masked(self, vector: int) -> bool:
        return self.masking and bool(self._config.get(self._mask, 4) >> vector & 1)

    def set_pending(self, vector: int, pending: bool) -> None:
        if self.masking:
            bits = self._config.get(self._mask + 4, 4) & ~(1 << vector)
            bits |= int(pending) << vector
            self._config.data[self._mask + 4 : self._mask + 8] = bits.to_bytes(4, "little")

    def is_pending(self, vector: int) -> bool:
        return self.masking and bool(self._config.get(self._mask + 4, 4) >> vector & 1)


class MsixCapability:
    """The MSI-X capability at `offset` of `config`, its table and its pending bits.

    `table_bar`, `table_offset`, `pba_bar` and `pba_offset` say where the guest finds these.
    """

    def __init__(self, config: ConfigSpace, offset: int, flags: int, table: int, pba: int) -> None:
        self._config = config
        self.offset = offset
        self.count = (flags & MSIX_TABLE_SIZE) + 1
        self.table_bar, self.table_offset = table & MSIX_BIR, table & ~MSIX_BIR
        self.pba_bar, self.pba_offset = pba & MSIX_BIR, pba & ~MSIX_BIR
        control = MSIX_ENABLE | MSIX_MASK_ALL
        config.emulate(offset + MSIX_FLAGS, 2, 0, control, control)
        self.vmstate = VMStateDescription(
            "msix", 0, 0, (buffer("table", self.table_size), buffer("pba", (self.count + 7) // 8))
        )
        self.reset()

    @property
    def table_size(self) -> int:
        return self.count * ENTRY_SIZE

    @property
    def pba_size(self) -> int:
        """Whole quadwords."""
        return (self.count + 63) // 64 * 8

    def reset(self) -> None:
        """All vectors masked, none pending."""
        entry = bytes(ENTRY_SIZE - 4) + ENTRY_MASKED.to_bytes(4, "little")
        self._table = bytearray(entry * self.count)
        self._pba = bytearray(self.pba_size)

    @property
    def enabled(self) -> bool:
        return bool(self._config.get(self.offset + MSIX_FLAGS, 2) & MSIX_ENABLE)

    def message(self, vector: int) -> tuple[int, int]:
        place = vector * ENTRY_SIZE
        address = int.from_bytes(self._table[place : place + 8], "little")
        return address, int.from_bytes(self._table[place + 8 : place + 12], "little")

    def is_masked(self, vector: int) -> bool:
        if self._config.get(self.offset + MSIX_FLAGS, 2) & MSIX_MASK_ALL:
            return True
        return bool(self._table[vector * ENTRY_SIZE + 12] & ENTRY_MASKED)

    def set_pending(self, vector: int, pending: bool) -> None:
        bit = 1 << vector % 8
        if pending:
            self._pba[vector // 8] |= bit
        else:
            self._pba[vector // 8] &= ~bit

    def is_pending(self, vector: int) -> bool:
        return bool(self._pba[vector // 8] >> vector % 8 & 1)

    def read_table(self, offset: int, size: int) -> int:
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> int:
        """Writes a part of an entry; returns the vector that it belongs to.

        A write that is not aligned, or not all within the table, vanishes: -1.
        """
        if offset % size or not 0 <= offset <= self.table_size - size:
            return -1
        self._table[offset : offset + size] = value.to_bytes(size, "little")
        return offset // ENTRY_SIZE

    def read_pba(self, offset: int, size: int) -> int:
        return int.from_bytes(self._pba[offset : offset + size], "little")

    def save(self) -> dict:
        return {"table": bytes(self._table), "pba": bytes(self._pba[: (self.count + 7) // 8])}

    def restore(self, state: dict) -> None:
        self._table = bytearray(state["table"])
        self._pba = bytearray(state["pba"].ljust(self.pba_size, b"\0"))
