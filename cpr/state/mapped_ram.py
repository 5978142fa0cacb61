"""mapped-ram: each page of a RAM block has its place in the file.

    in the list of blocks, after each block's entry:
        u32 1 (version), u64 4096 (page size), u64 bitmap offset, u64 pages offset
    bitmap   directly after that: little-endian u64 words, a set bit means that the page is there
    pages    from the next multiple of 1 MiB on; the list goes on after the block's last page

Offsets are of the whole file, and big-endian as all in the stream.
"""

from __future__ import annotations

import struct
from errno import EINVAL

from cpr.constants import MAX_FILE_OFFSET, PAGE_SIZE
from cpr.state.reader import LoadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.state.reader import Reader

_HEADER = struct.Struct(">IQQQ")
VERSION = 1
ALIGNMENT = 1 << 20


class Layout:
    """Where the bitmap and the pages of one block are in the file, in bytes."""

    __slots__ = ("bitmap_offset", "bitmap_size", "end", "pages_offset")

    def __init__(self, bitmap_offset: int, pages_offset: int, used_length: int) -> None:
        self.bitmap_offset = bitmap_offset
        self.bitmap_size = (used_length // PAGE_SIZE + 63) // 64 * 8
        self.pages_offset = pages_offset
        self.end = pages_offset + used_length

    @classmethod
    def at(cls, offset: int, used_length: int) -> Layout:
        """The layout of a block whose header is written at `offset`."""
        bitmap_offset = offset + _HEADER.size
        layout = cls(bitmap_offset, 0, used_length)
        end_of_bitmap = bitmap_offset + layout.bitmap_size
        return cls(bitmap_offset, -(-end_of_bitmap // ALIGNMENT) * ALIGNMENT, used_length)

    def header(self) -> bytes:
        return _HEADER.pack(VERSION, PAGE_SIZE, self.bitmap_offset, self.pages_offset)

    @classmethod
    def take(cls, reader: Reader, used_length: int) -> Layout:
        """Takes the header.  Raises LoadError for one that is not of this version."""
        version, page_size, bitmap_offset, pages_offset = _HEADER.unpack(reader.read(_HEADER.size))
        if version > VERSION:
            raise LoadError(
                EINVAL,
                f"Migration mapped-ram capability version not supported (expected version "
                f"{VERSION}, received {version})",
            )
        if page_size != PAGE_SIZE:
            raise LoadError(EINVAL, f"Migration mapped-ram page size {page_size} is not supported")
        layout = cls(bitmap_offset, pages_offset, used_length)
        if max(bitmap_offset + layout.bitmap_size, layout.end) > MAX_FILE_OFFSET:
            raise LoadError(
                EINVAL,
                f"Migration mapped-ram offsets {bitmap_offset:#x} and {pages_offset:#x} are in no "
                "file",
            )
        return layout
