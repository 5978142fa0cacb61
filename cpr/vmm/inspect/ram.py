"""The bodies of 'ram' sections: the list of blocks, and what there is of their pages.

with x-ignore-shared  each block of the list has its guest-physical address, u64
with mapped-ram       each block has u32 version, u64 page size, u64 offset of the bitmap, u64
                      offset of the pages; both offsets are from the beginning of the file, or
                      0 for a block that is not in it; what comes next is after the pages
XBZRLE                a page as its difference: u8 encoding, u16 length, data
"""

from __future__ import annotations

from typing import Any

from cpr.state import mapped_ram
from cpr.state.ram_section import (
    CONTINUE,
    EOS,
    FLAGS,
    HOOK,
    MEM_SIZE,
    MULTIFD_FLUSH,
    PAGE,
    PAGE_SIZE,
    VERSION_ID,
    ZERO,
)
from cpr.vmm.inspect.cursor import Cursor, Damage

XBZRLE = 0x40

ZERO_PAGE = 0
"""The place of a page of zeros; no page is at offset 0 of a file."""
NO_PLACE = -1
"""The place of a page of which the file has only a difference."""


class Block:
    """A RAM block: lengths in bytes, `address` guest-physical or None, numbers of its pages.

    `places` maps the offset of a page in the block to the file offset of its last content.
    """

    __slots__ = ("address", "idstr", "normal", "places", "used_length", "xbzrle", "zero")

    def __init__(self, idstr: str, used_length: int, address: int | None) -> None:
        self.idstr = idstr
        self.used_length = used_length
        self.address = address
        self.normal = 0
        self.zero = 0
        self.xbzrle = 0
        self.places: dict[int, int] = {}

    def to_json(self) -> dict[str, Any]:
        return {
            "block": self.idstr,
            "used_length": self.used_length,
            "address": self.address,
            "normal_pages": self.normal,
            "zero_pages": self.zero,
            "xbzrle_pages": self.xbzrle,
        }


class RamWalker:
    """Goes through the 'ram' sections of one stream; `blocks` by idstr is what it found.

    `keep_places`: remember where each page is; 100 bytes or so a page.
    """

    def __init__(self, ignore_shared: bool, mapped_ram: bool, keep_places: bool) -> None:
        self.blocks: dict[str, Block] = {}
        self._ignore_shared = ignore_shared
        self._mapped_ram = mapped_ram
        self._keep_places = keep_places
        self._block: Block | None = None

    def pages(self) -> int:
        """How many pages there were up to here."""
        return sum(block.normal + block.zero + block.xbzrle for block in self.blocks.values())

    def walk(self, cursor: Cursor, version_id: int) -> None:
        """Takes one body.  Raises EndOfStream where the file is cut, Damage."""
        if version_id != VERSION_ID:
            raise Damage(cursor.offset, f"version {version_id} of 'ram' is not {VERSION_ID}")
        while True:
            begin = cursor.offset
            word = cursor.integer(8)
            address, flags = word & ~FLAGS, word & FLAGS
            kind = flags & ~CONTINUE
            if kind == MEM_SIZE:
                self._take_block_list(cursor, address)
            elif kind in (ZERO, PAGE, XBZRLE):
                self._take_page(cursor, begin, address, flags)
            elif kind == EOS:
                return
            elif kind not in (HOOK, MULTIFD_FLUSH):
                raise Damage(begin, f"Unknown combination of migration flags: 0x{flags:x}")

    def _take_block_list(self, cursor: Cursor, total: int) -> None:
        while total:
            begin = cursor.offset
            block = Block(cursor.name(), cursor.integer(8), None)
            if block.used_length > total:
                raise Damage(
                    begin,
                    f"RAM block '{block.idstr}' is {block.used_length} bytes long, "
                    f"but only {total} are left of the total",
                )
            total -= block.used_length
            if self._ignore_shared:
                block.address = cursor.integer(8)
            self.blocks[block.idstr] = block
            if self._mapped_ram:
                self._take_mapped(cursor, block)

    def _take_mapped(self, cursor: Cursor, block: Block) -> None:
        begin = cursor.offset
        version, page_size = cursor.integer(4), cursor.integer(8)
        bitmap_offset, pages_offset = cursor.integer(8), cursor.integer(8)
        if version != mapped_ram.VERSION or page_size != PAGE_SIZE:
            raise Damage(
                begin, f"mapped-ram version {version} with pages of {page_size} bytes is not known"
            )
        if not pages_offset:
            return
        bitmap_size = (block.used_length // page_size + 7) // 8
        if not cursor.offset <= bitmap_offset <= pages_offset - bitmap_size:
            raise Damage(
                begin,
                f"the bitmap at {bitmap_offset:#x} and the pages at {pages_offset:#x} of RAM "
                f"block '{block.idstr}' do not come one after the other",
            )
        cursor.offset = bitmap_offset
        bitmap = int.from_bytes(cursor.read(bitmap_size), "little")
        cursor.offset = pages_offset
        cursor.skip(block.used_length)
        count = block.used_length // page_size
        block.normal = bitmap.bit_count()
        block.zero = count - block.normal
        if self._keep_places:
            for page in range(count):
                offset = page * page_size
                block.places[offset] = pages_offset + offset if bitmap >> page & 1 else ZERO_PAGE

    def _take_page(self, cursor: Cursor, begin: int, offset: int, flags: int) -> None:
        block = self._take_block(cursor, begin, flags)
        if offset >= block.used_length:
            raise Damage(begin, f"Illegal RAM offset {offset:x}")
        place = cursor.offset
        if flags & PAGE:
            cursor.skip(PAGE_SIZE)
            block.normal += 1
        elif flags & ZERO:
            fill = cursor.integer(1)
            if fill:
                raise Damage(place, f"Found a zero page with value {fill}")
            place = ZERO_PAGE
            block.zero += 1
        else:
            cursor.skip(1)
            cursor.skip(cursor.integer(2))
            place = NO_PLACE
            block.xbzrle += 1
        if self._keep_places:
            block.places[offset] = place

    def _take_block(self, cursor: Cursor, begin: int, flags: int) -> Block:
        if flags & CONTINUE:
            text = "Ack, bad migration stream!"
        else:
            idstr = cursor.name()
            self._block = self.blocks.get(idstr)
            text = f"Can't find block {idstr}"
        if self._block is None:
            raise Damage(begin, text)
        return self._block
