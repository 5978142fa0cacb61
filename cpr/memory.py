"""The guest-physical address map: which part of which RAMBlock is where."""

from __future__ import annotations

from cpr.constants import PAGE_SIZE
from cpr.errors import CprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from cpr.ram import RAMBlock

    class MemoryListener(Protocol):
        """Who is told of every section that comes and goes; what it raises stops the change."""

        def section_added(self, section: Section) -> None: ...
        def section_removed(self, section: Section) -> None: ...


OFFSET_ALIGNMENT = (
    64 * PAGE_SIZE
)  # ram_addr_t granularity of QEMU's ram_list, seen in info ramblock


class Section:
    """[start, start+size) of guest-physical space is `block` from `offset` on."""

    __slots__ = ("block", "name", "offset", "readonly", "size", "start")

    def __init__(
        self, start: int, size: int, block: RAMBlock, offset: int, readonly: bool, name: str
    ) -> None:
        self.start = start
        self.size = size
        self.block = block
        self.offset = offset
        self.readonly = readonly
        self.name = name


class GuestMemory:
    """The guest-physical address map of RAM and ROM."""

    def __init__(self) -> None:
        self.blocks: list[RAMBlock] = []
        self.sections: list[Section] = []
        self._listeners: list[MemoryListener] = []
        self._next_offset = 0

    def add_block(self, block: RAMBlock) -> RAMBlock:
        """Takes over `block` and gives it its ram_addr offset."""
        block.offset = self._next_offset
        end = block.offset + block.max_length
        self._next_offset = (end + OFFSET_ALIGNMENT - 1) // OFFSET_ALIGNMENT * OFFSET_ALIGNMENT
        self.blocks.append(block)
        return block

    def add_section(
        self, start: int, size: int, block: RAMBlock, offset: int, readonly: bool, name: str
    ) -> Section:
        section = Section(start, size, block, offset, readonly, name)
        for done, listener in enumerate(self._listeners):
            try:
                listener.section_added(section)
            except CprError:
                for told in self._listeners[:done]:
                    told.section_removed(section)
                raise
        self.sections.append(section)
        return section

    def add_listener(self, listener: MemoryListener) -> None:
        """Tells `listener` of the sections there are, and from now on of every change.

        What it raises passes through; then it has been told of the opposite again.
        """
        for done, section in enumerate(self.sections):
            try:
                listener.section_added(section)
            except CprError:
                for told in self.sections[:done]:
                    listener.section_removed(told)
                raise
        self._listeners.append(listener)

    def remove_listener(self, listener: MemoryListener) -> None:
        """The inverse of `add_listener`: as if all the sections had gone."""
        self._listeners.remove(listener)
        for section in self.sections:
            listener.section_removed(section)

    def find(self, address: int) -> Section | None:
        """The section that holds guest-physical `address`."""
        for section in self.sections:
            if section.start <= address < section.start + section.size:
                return section
        return None

    def read(self, address: int, size: int) -> bytes:
        """Reads guest-physical memory; where there is none, ones, as an open bus reads."""
        data = bytearray(b"\xff" * size)
        for position, section, offset, length in self._spans(address, size):
            data[position : position + length] = section.block.read(offset, length)
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """Writes guest-physical memory, ROM included; where there is none, nothing happens.

        This is the way for device code, DMA above all: a copy of RAM that is being made while the
        guest runs learns of it.
        """
        for position, section, offset, length in self._spans(address, len(data)):
            section.block.write(offset, data[position : position + length])

    def discard(self, address: int, size: int) -> None:
        """Gives what of the range is RAM, and not ROM, back to the host: it reads as zeros."""
        for _, section, offset, length in self._spans(address, size):
            if not section.readonly:
                section.block.discard(offset, length)

    def _spans(self, address: int, size: int) -> list[tuple[int, Section, int, int]]:
        """(position in [address, address+size), section, offset in its block, length) of all the
        parts."""
        spans = []
        for section in self.sections:
            start = max(address, section.start)
            end = min(address + size, section.start + section.size)
            if start < end:
                offset = section.offset + start - section.start
                spans.append((start - address, section, offset, end - start))
        return spans

    def close(self) -> None:
        for block in self.blocks:
            block.close()
        self.blocks = []
        self.sections = []
