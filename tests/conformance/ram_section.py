"""The ram section of a migration stream: its blocks, and the pages where there are any.

u8 1, u32 id, u8 3, 'ram', u32 0, u32 4
u64 total | 4, { u8 length, name, u64 used length [, u64 address] } …, u64 0x10, footer
{ u8 2 or 3, u32 id, records, u64 0x10, footer } …      3 is the last; commands come in between
record = u64 offset | flags [, u8 length, name], u8 0 or the page
"""

from __future__ import annotations

import struct

PAGE_SIZE = 4096
ZERO, MEM_SIZE, PAGE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
HEADER = struct.pack(">BIB3sII", 1, 1, 3, b"ram", 0, 4)
PART, END, COMMAND, FOOTER = 2, 3, 8, 0x7E


class RamSection:
    """`blocks` are used lengths by name, `pages` contents by name and offset.

    `addressed` says that each block has a guest-physical address, as with x-ignore-shared.  The
    section is [start, end); raises ValueError or struct.error where it is not what the module says.
    """

    def __init__(self, data: bytes, start: int, addressed: bool) -> None:
        self.blocks: dict[str, int] = {}
        self.addresses: dict[str, int] = {}
        self.pages: dict[tuple[str, int], bytes] = {}
        self._data = data
        self._at = start
        self._name = ""
        if self._take(len(HEADER)) != HEADER:
            raise ValueError("no header of a ram section")
        self._read_blocks(addressed)
        self._read_footer()
        while self._read_part():
            pass
        self.end = self._at

    def _take(self, size: int) -> bytes:
        data = self._data[self._at : self._at + size]
        self._at += size
        return data

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _text(self) -> str:
        return self._take(self._number(1)).decode()

    def _read_blocks(self, addressed: bool) -> None:
        total = self._number(8)
        if total % PAGE_SIZE != MEM_SIZE:
            raise ValueError(f"the ram section begins with {total:#x}")
        while sum(self.blocks.values()) < total - MEM_SIZE:
            name = self._text()
            self.blocks[name] = self._number(8)
            if addressed:
                self.addresses[name] = self._number(8)
        if self._number(8) != EOS:
            raise ValueError("no end after the blocks")

    def _read_footer(self) -> None:
        footer = self._take(5)
        if footer != struct.pack(">BI", FOOTER, 1):
            raise ValueError(f"the footer is {footer!r}")

    def _read_part(self) -> bool:
        """Reads a part, or a command; False after the last part."""
        kind = self._number(1)
        if kind == COMMAND:
            self._number(2)
            self._take(self._number(2))
            return True
        if kind not in (PART, END) or self._number(4) != 1:
            raise ValueError(f"a section of type {kind}")
        while self._read_record():
            pass
        self._read_footer()
        return kind == PART

    def _read_record(self) -> bool:
        record = self._number(8)
        offset, flags = record & -PAGE_SIZE, record % PAGE_SIZE
        if flags == EOS:
            return False
        if not flags & CONTINUE:
            self._name = self._text()
        if flags & ~CONTINUE == ZERO:
            self.pages[self._name, offset] = self._take(1) * PAGE_SIZE
        elif flags & ~CONTINUE == PAGE:
            self.pages[self._name, offset] = self._take(PAGE_SIZE)
        else:
            raise ValueError(f"a record with flags {flags:#x}")
        return True
