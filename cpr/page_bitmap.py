"""Bitmaps of guest pages: which ones were written, as KVM's dirty log and device code tell it."""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib
from cpr.constants import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WORD_BITS = 64
ENTRY_SIZE = 8  # bytes of an entry of /proc/PID/pagemap
READ_PAGES = 1 << 16


def bitmap_size(pages: int) -> int:
    """The bytes of a bitmap of so many pages: whole 64-bit words."""
    return (pages + WORD_BITS - 1) // WORD_BITS * 8


class PageBitmap:
    """A bit for each of `pages` pages, all clear.  Page n is bit n % 64 of word n // 64.

    `words` is the memory of the bitmap, as `pages.Pages` takes it: 64-bit little-endian words.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.words = bytearray(bitmap_size(pages))
        self._words = ffi.from_buffer("uint64_t[]", self.words)

    @property
    def address(self) -> Any:
        """Where the words are, for C; valid as long as the bitmap."""
        return self._words

    def set(self, first: int, count: int) -> None:
        """Sets `count` bits from page `first` on; from any thread, also during `take`.

        Raises ValueError where there are not so many pages.
        """
        if first < 0 or count < 0 or first + count > self.pages:
            raise ValueError(f"no {count} pages at {first} of {self.pages}")
        lib.cpr_bitmap_set(self._words, first, count)

    def take(self, other: PageBitmap) -> None:
        """Adds the bits of `other`, which has as many pages, and clears them there."""
        lib.cpr_bitmap_take(self._words, other._words, min(self.pages, other.pages))

    def merge(self, first: int, words: bytearray, count: int) -> None:
        """Adds a bitmap of `count` pages, the first of which is our page `first`.

        Raises ValueError where one of them has not so many pages.
        """
        if first < 0 or first + count > self.pages or len(words) * 8 < count:
            raise ValueError(f"no {count} pages at {first} of {self.pages}")
        source: Any = ffi.from_buffer("uint64_t[]", words)
        lib.cpr_bitmap_merge(self._words, first, source, count)

    def count(self) -> int:
        """How many bits are set."""
        return int(lib.cpr_bitmap_count(self._words, self.pages))

    def clear(self) -> None:
        ffi.memmove(self._words, bytes(len(self.words)), len(self.words))


def existing_pages(host: int, pages: int) -> PageBitmap:
    """Which of the pages at address `host` of this process are in memory or in swap.

    In private anonymous memory the others are zero, and reading them would cost page tables.
    Raises OSError.
    """
    result = PageBitmap(pages)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < pages:
            size = min(READ_PAGES, pages - done) * ENTRY_SIZE
            data = os.pread(fd, size, (host // PAGE_SIZE + done) * ENTRY_SIZE)
            if not data:
                raise OSError(f"/proc/self/pagemap has no page at {host + done * PAGE_SIZE:#x}")
            entries: Any = ffi.from_buffer("uint64_t[]", data)
            lib.cpr_bitmap_merge_pagemap(result._words, done, entries, len(entries))
            done += len(entries)
    finally:
        os.close(fd)
    return result
