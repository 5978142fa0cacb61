"""Walks a guest's page tables (Intel SDM vol. 3, chapter 4), for `x` and other examiners."""

from __future__ import annotations

from cpr.accel import x86

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PRESENT = 1 << 0
PAGE_SIZE_BIT = 1 << 7
ADDRESS_MASK = 0x000F_FFFF_FFFF_F000
CR4_PSE = 1 << 4


def translate(state: dict, read: Callable[[int, int], bytes], virtual: int) -> int | None:
    """The guest-physical address of linear address `virtual`, or None where it is not mapped.

    `state` has the fields of x86.VMSTATE_CPU; `read(address, size)` reads guest-physical memory.
    """
    cr0, _, _, cr3, cr4 = state["env.cr"]
    if not cr0 & x86.CR0_PG:
        return virtual & 0xFFFFFFFF
    if not cr4 & x86.CR4_PAE:
        return _walk_32bit(read, cr3, cr4, virtual & 0xFFFFFFFF)
    if state["env.efer"] & x86.EFER_LMA:
        levels: tuple[int, ...] = (39, 30, 21, 12)
        table = cr3 & ADDRESS_MASK
    else:
        virtual &= 0xFFFFFFFF
        levels = (30, 21, 12)
        table = cr3 & 0xFFFFFFE0
    for shift in levels:
        entry = int.from_bytes(read(table + 8 * (virtual >> shift & 0x1FF), 8), "little")
        if not entry & PRESENT:
            return None
        if shift == 12 or (entry & PAGE_SIZE_BIT and shift in (21, 30)):
            offset = (1 << shift) - 1
            return entry & ADDRESS_MASK & ~offset | virtual & offset
        table = entry & ADDRESS_MASK
    return None


def _walk_32bit(read: Callable[[int, int], bytes], cr3: int, cr4: int, virtual: int) -> int | None:
    directory = int.from_bytes(read((cr3 & 0xFFFFF000) + 4 * (virtual >> 22), 4), "little")
    if not directory & PRESENT:
        return None
    if directory & PAGE_SIZE_BIT and cr4 & CR4_PSE:
        return directory & 0xFFC00000 | virtual & 0x3FFFFF
    entry_at = (directory & 0xFFFFF000) + 4 * (virtual >> 12 & 0x3FF)
    entry = int.from_bytes(read(entry_at, 4), "little")
    return entry & 0xFFFFF000 | virtual & 0xFFF if entry & PRESENT else None
