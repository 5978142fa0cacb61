"""Guest RAM: a RAMBlock, which owns its mapping and its descriptor, and what populates it.

`ram_backend` makes them.
"""

from __future__ import annotations

import errno
import os

from cpr._native._cpr import ffi, lib
from cpr.constants import PAGE_SIZE
from cpr.errors import ConfigError, KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from cpr.page_bitmap import PageBitmap

HUGEPAGES = "/sys/kernel/mm/hugepages"
POPULATE_CHUNK = 2 << 20  # of a guest that runs: the mmap lock is not held for long


class RAMBlock:
    """One contiguous block of guest RAM.

    `size` is the used length and `max_length` the mapped one, in bytes; `host` is the address of
    the mapping; `alignment` is that address's, and `fd` is -1 for anonymous memory.  `preserved`
    says that the descriptor goes over an exec, `reopened` that the new VMM opens the same file
    again by its path; a block that is neither loses its content in an exec, unless it is
    `regenerated` (a ROM that the machine makes).  `path` is the file's, else "", and `fresh` says
    that it had no content when it was opened.  `stale` says that it is a file whose bytes may be
    another guest's, so that pages which do not come in a state are to be cleared.  `prealloc` asks
    for all of it to be populated, `populated` bytes of it are by now.

    While a copy of the block is being made for another image, `copy_fd` is that copy's memfd, else
    -1, and `written` a bitmap of the pages that this process itself writes, else None; for threads
    in C `written_cell` points to that bitmap's words.
    """

    __slots__ = (
        "_former",
        "_written",
        "alignment",
        "backend",
        "copy_fd",
        "fd",
        "fresh",
        "host",
        "idstr",
        "kept",
        "max_length",
        "offset",
        "page_size",
        "path",
        "populated",
        "prealloc",
        "preserved",
        "readonly",
        "regenerated",
        "reopened",
        "shared",
        "size",
        "stale",
        "written_cell",
    )

    def __init__(self, idstr: str, size: int, backend: str) -> None:
        self.idstr = idstr
        self.size = size
        self.max_length = size
        self.backend = backend
        self.page_size = PAGE_SIZE
        self.alignment = PAGE_SIZE
        self.fd = -1
        self.host = 0
        self.offset = 0
        self.shared = False
        self.readonly = False
        self.prealloc = False
        self.populated = 0
        self.preserved = False
        self.kept = False
        self.reopened = False
        self.path = ""
        self.fresh = False
        self.stale = False
        self.regenerated = False
        self.copy_fd = -1
        self.written_cell = ffi.new("uint64_t *[1]")
        self._written: PageBitmap | None = None
        self._former: PageBitmap | None = None

    @property
    def written(self) -> PageBitmap | None:
        return self._written

    @written.setter
    def written(self, bitmap: PageBitmap | None) -> None:
        self._former = self._written  # a thread may yet be setting a bit
        self._written = bitmap
        self.written_cell[0] = ffi.NULL if bitmap is None else bitmap.address

    def view(self, offset: int, size: int) -> memoryview:
        """[offset, offset+size) of the block, to be read; valid until `close`.

        Raises ValueError for what is not in the block.
        """
        return memoryview(self._buffer(offset, size)).toreadonly()

    def read(self, offset: int, size: int) -> bytes:
        """[offset, offset+size) of the block.  Raises ValueError as `view` does.

        A file is not read through its mapping: there may be no room for a page that is not there
        yet, and somebody may have cut it.
        """
        if not self.reopened:
            return bytes(self.view(offset, size))
        self._buffer(offset, size)
        try:
            return os.pread(self.fd, size, offset).ljust(size, b"\0")
        except OSError as error:
            raise KernelError(f"reading RAM block '{self.idstr}'", error.errno or 0) from None

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes `data` to the block, and marks it so.  Raises ValueError as `view` does."""
        self._buffer(offset, len(data))[:] = data
        self.mark_written(offset, len(data))

    def mark_written(self, offset: int, size: int) -> None:
        """To be called after any write to the mapping that neither `write` nor the guest did."""
        written = self.written
        if written is not None and size:
            first = offset // PAGE_SIZE
            written.set(first, (offset + size - 1) // PAGE_SIZE - first + 1)

    def discard(self, offset: int, size: int) -> None:
        """Gives pages back to the host: they are zeros when they are next used.

        Huge pages stay, and so does what the host does not take.  Raises ValueError as `view`.
        """
        self._buffer(offset, size)
        if self.page_size == PAGE_SIZE:
            address = ffi.cast("void *", self.host + offset)
            lib.madvise(address, size, lib.MADV_REMOVE if self.shared else lib.MADV_DONTNEED)
            self.mark_written(offset, size)

    def _buffer(self, offset: int, size: int) -> Any:
        if offset < 0 or offset + size > self.max_length:
            raise ValueError(f"{self.idstr}: no {size} bytes at offset {offset:#x}")
        return ffi.buffer(ffi.cast("char *", self.host + offset), size)

    @property
    def is_theirs(self) -> bool:
        """Whether its content came with a CPR state: another image or VMM may run a guest in it."""
        return self.kept or (self.reopened and not self.stale)

    @property
    def outgoing_fd(self) -> int:
        """The descriptor in which the next image finds this RAM: the copy's, or its own; or -1."""
        return self.copy_fd if self.copy_fd >= 0 or not self.preserved else self.fd

    def cpr_blocker(self, regenerates: bool = True) -> str | None:
        """Why an update would lose this block's content, in QEMU's words, or None.

        `regenerates`: the new VMM makes the regenerated blocks again, as after an exec.
        """
        if self.preserved or self.reopened or (self.regenerated and regenerates):
            return None
        return (
            f"Memory region {self.idstr} is not compatible with CPR. share=on is required for "
            "memory-backend objects, and aux-ram-share=on is required."
        )

    def unmap(self) -> None:
        """Unmaps the block; its descriptor stays."""
        if self.host:
            lib.munmap(ffi.cast("void *", self.host), self.max_length)
            self.host = 0

    def close(self) -> None:
        """Unmaps the block and closes its descriptor."""
        self.unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def populate(block: RAMBlock) -> None:
    """Populates the whole block writable, as prealloc=on asks for.

    Raises ConfigError where the host has not enough memory.
    """
    while populate_chunk(block):
        pass


def populate_chunk(block: RAMBlock) -> bool:
    """Populates the next chunk, of 2 MiB or one page; false where there is none.

    `block.populated` tells how far it is, in bytes; any thread may do this while the guest runs.
    Raises ConfigError where the host has not enough memory.
    """
    size = min(max(POPULATE_CHUNK, block.page_size), block.size - block.populated)
    if size <= 0:
        return False
    populate_range(block, block.populated, size)
    block.populated += size
    return True


def populate_range(block: RAMBlock, offset: int, size: int) -> None:
    """Populates so many bytes of the block, writable.  Raises ConfigError as `populate`."""
    address = ffi.cast("void *", block.host + offset)
    if lib.madvise(address, size, lib.MADV_POPULATE_WRITE) < 0:
        # EFAULT: what would be a SIGBUS (madvise(2)), as where a tmpfs is full.
        number = errno.ENOSPC if ffi.errno == errno.EFAULT else ffi.errno
        raise no_memory(block, OSError(number, os.strerror(number)))


def touched(block: RAMBlock) -> Iterator[tuple[int, int]]:
    """The ranges [start, end) of a block that its file has memory for, in bytes."""
    if block.fd < 0:
        return
    end = 0
    while end < block.size:
        try:
            start = os.lseek(block.fd, block.offset + end, os.SEEK_DATA) - block.offset
            end = os.lseek(block.fd, block.offset + start, os.SEEK_HOLE) - block.offset
        except OSError:  # ENXIO: only a hole is left
            return
        if start < block.size:
            yield start, min(end, block.size)


def no_memory(block: RAMBlock, error: OSError) -> ConfigError:
    """The error for a block that the host has not enough memory for, with the remedy."""
    if block.page_size == PAGE_SIZE:
        return ConfigError(f"cannot set up guest memory '{block.idstr}': {error.strerror}")
    kib = block.page_size >> 10
    pool = f"{HUGEPAGES}/hugepages-{kib}kB"
    need = block.size // block.page_size
    return ConfigError(
        f"unable to map backing store for guest RAM: {error.strerror}; '{block.idstr}' needs "
        f"{need} pages of {kib} KiB and {_read_number(pool + '/free_hugepages')} are free: "
        f"echo {need} > {pool}/nr_hugepages"
    )


def _read_number(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
