"""Guest pages for tests: a memfd that is mapped, and the records that Python makes of its pages."""

from __future__ import annotations

import ctypes
import mmap
import os

from ram_records import PageEncoder

from cpr.pages import PAGE_SIZE, Pages

ZEROS = bytes(PAGE_SIZE)


class Memory:
    """A memfd, mapped; `count` pages, none of them there yet."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, count * PAGE_SIZE)
        self.map = mmap.mmap(self.fd, count * PAGE_SIZE)
        self._first = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._first)

    def pages(self, bitmap: bytes | bytearray | None = None, **options: bool) -> Pages:
        return Pages("RAM", self.address, self.count, self.fd, bitmap, **options)

    def __setitem__(self, page: int, data: bytes) -> None:
        self.map[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = data

    def content(self) -> list[bytes]:
        """All the pages, by a way that fills no hole."""
        data = os.pread(self.fd, self.count * PAGE_SIZE, 0)
        return [data[i : i + PAGE_SIZE] for i in range(0, len(data), PAGE_SIZE)]

    def present(self) -> int:
        """How many pages are not holes."""
        return os.fstat(self.fd).st_blocks * 512 // PAGE_SIZE

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        del self._first
        self.map.close()
        os.close(self.fd)


def memory_of(content: list[bytes]) -> Memory:
    memory = Memory(len(content))
    for page, data in enumerate(content):
        if data != ZEROS:
            memory[page] = data
    return memory


def encoded(pages: list[bytes], selected: set[int], idstr: str = "ram0") -> bytes:
    """The records that Python makes of the pages."""
    encoder = PageEncoder()
    return b"".join(
        encoder.zero_page(idstr, page * PAGE_SIZE)
        if pages[page] == ZEROS
        else encoder.page(idstr, page * PAGE_SIZE, pages[page])
        for page in sorted(selected)
    )
