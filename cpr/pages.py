"""Guest RAM in bulk: copies, page records of the migration stream, pages at places of a file.

The work is done in C by the threads of a PagePool, without the GIL.  Which pages it is for, and
how far it is, is in a Pages: each call goes on from there, up to a budget in bytes, so that the
caller can limit the rate between calls; another thread can cancel the one that is running.

The guest may run meanwhile.  A page that it writes while it is handled may be taken as it was
before, as it is after, or in parts: the caller has it in the next dirty bitmap.
"""

from __future__ import annotations

import os
from errno import ENOTSUP

from cpr._native._cpr import ffi, lib
from cpr.constants import PAGE_SIZE
from cpr.errors import CprError, KernelError
from cpr.page_bitmap import bitmap_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from _typeshed import ReadableBuffer

    from cpr.ram import RAMBlock

NO_LIMIT = (1 << 64) - 1

INSTRUCTION_SETS = ("avx512", "avx2", "portable")  # the fastest first

# What becomes of a page that is zero in the source of a copy.
ZERO_COPY = lib.CPR_ZERO_COPY  # it is copied: no page is looked at
ZERO_SKIP = lib.CPR_ZERO_SKIP  # nothing: the target is known to be zero there
ZERO_CLEAR = lib.CPR_ZERO_CLEAR  # the target's page is cleared, unless it is a hole or zero already


class PageCounts:
    """What a call has done: pages that were zero, pages that were not, and bytes of its budget."""

    __slots__ = ("bytes", "normal", "zero")

    def __init__(self, zero: int = 0, normal: int = 0, bytes: int = 0) -> None:
        self.zero = zero
        self.normal = normal
        self.bytes = bytes


class Pages:
    """Which pages of a memory are meant, and how many of these are done.

    The memory is `count` pages at address `host`, which is the caller's and stays mapped; `name`
    is for errors.  `fd`, also the caller's, is the file that is mapped there shared and from its
    start, or -1.  With it, the holes of the file are not read, because reading would fill them;
    that costs a system call or two for each run of pages.

    `bitmap` says which pages: those whose bit is set (clear, where `inverted`), in KVM's layout:
    page n is bit n % 64 of the little-endian word n // 64.  It is at least `bitmap_size(count)`
    bytes, aligned to 8, and is read in place.  None means all the pages.
    """

    __slots__ = ("_bitmap", "count", "name", "walk")

    def __init__(
        self,
        name: str,
        host: int,
        count: int,
        fd: int = -1,
        bitmap: ReadableBuffer | None = None,
        inverted: bool = False,
    ) -> None:
        self.name = name
        self.count = count
        self._bitmap = ffi.NULL if bitmap is None else _words(bitmap, count)
        self.walk = ffi.new("struct cpr_page_walk *")
        _set_memory(self.walk.memory, host, count, fd)
        self.walk.bitmap = self._bitmap
        self.walk.inverted = NO_LIMIT if inverted else 0

    @classmethod
    def of_block(
        cls,
        block: RAMBlock,
        bitmap: ReadableBuffer | None = None,
        inverted: bool = False,
        holes: bool = True,
    ) -> Pages:
        """The pages of the used length of `block`, which stays open.

        `holes=False` where the bitmap is of pages that were written: there are no holes then.
        """
        fd = _holes_of(block) if holes else -1
        return cls(block.idstr, block.host, block.size // PAGE_SIZE, fd, bitmap, inverted)

    @property
    def position(self) -> int:
        """The first page that is not done; means nothing after an error."""
        return int(self.walk.next)

    @position.setter
    def position(self, page: int) -> None:
        self.walk.next = page

    @property
    def done(self) -> bool:
        return self.position >= self.count

    def cancel(self) -> None:
        """Ends a call on these pages, and any later one, with KernelError ECANCELED.

        A call ends after the batches that it is at, at most 2 MiB for each thread; one that waits
        for a descriptor ends within 50 ms if that is non-blocking.  From any thread.
        """
        lib.cpr_page_walk_cancel(self.walk)


class PagePool:
    """Threads for the calls below, started once; the calling thread is one of the `threads`.

    None means as many as this process may use CPUs.  `instruction_set` is one of
    INSTRUCTION_SETS, or None for the fastest that the CPU has.  Calls from several threads take
    turns.  Raises CprError where the CPU has not that instruction set, and KernelError where
    threads cannot be started.
    """

    def __init__(self, threads: int | None = None, instruction_set: str | None = None) -> None:
        self.threads = len(os.sched_getaffinity(0)) if threads is None else threads
        name = ffi.NULL if instruction_set is None else instruction_set.encode()
        handle = ffi.new("struct cpr_page_pool **")
        error = lib.cpr_page_pool_create(self.threads, name, handle)
        if error == -ENOTSUP:
            raise CprError(f"this CPU has no instruction set '{instruction_set}'")
        _check(error, f"starting {self.threads} threads for pages")
        self.handle = handle[0]

    @property
    def instruction_set(self) -> str:
        """The one in use."""
        return ffi.string(lib.cpr_page_pool_ops(self.handle).name).decode()

    def close(self) -> None:
        """Ends the threads; no call may be under way."""
        if self.handle != ffi.NULL:
            lib.cpr_page_pool_destroy(self.handle)
            self.handle = ffi.NULL

    def __enter__(self) -> PagePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def copy(
        self,
        pages: Pages,
        target: Pages,
        zero_pages: int = ZERO_CLEAR,
        budget: int = NO_LIMIT,
    ) -> PageCounts:
        """Copies `pages` to the same page numbers of `target`'s memory.

        Ends when `budget` bytes are copied: no more, but at least one page.  Raises KernelError.
        """
        if target.count < pages.count:
            raise ValueError(f"{target.name} has fewer pages than {pages.name}")
        counts = ffi.new("struct cpr_page_counts *")
        memory = ffi.addressof(target.walk, "memory")
        error = lib.cpr_pages_copy(self.handle, pages.walk, memory, zero_pages, budget, counts)
        _check(error, f"copying pages of {pages.name} to {target.name}")
        return _counts(counts)

    def clear(self, pages: Pages) -> PageCounts:
        """Makes `pages` zero, writing only to those that are not.  Raises KernelError."""
        counts = ffi.new("struct cpr_page_counts *")
        _check(
            lib.cpr_pages_clear(self.handle, pages.walk, counts), f"clearing pages of {pages.name}"
        )
        return _counts(counts)

    def save(
        self, pages: Pages, fd: int, offset: int, present: bytearray, budget: int = NO_LIMIT
    ) -> PageCounts:
        """Writes page n at `offset` + n * 4096 of file `fd`, the caller's; zero pages are not.

        That is how QEMU's mapped-ram has them.  `present`, of `bitmap_size(pages.count)` bytes,
        gets a bit for each page that is written, and loses it for one that has become zero.
        `offset` is a multiple of 4096, so that `fd` may be O_DIRECT.  Ends when `budget` bytes are
        written: no more, but at least one page.  Raises KernelError.
        """
        counts = ffi.new("struct cpr_page_counts *")
        words = _words(present, pages.count)
        error = lib.cpr_file_save(self.handle, pages.walk, fd, offset, words, budget, counts)
        _check(error, f"writing pages of {pages.name} to descriptor {fd}")
        return _counts(counts)

    def load(self, pages: Pages, fd: int, offset: int) -> PageCounts:
        """Reads page n from `offset` + n * 4096 of file `fd`, the caller's.

        What `save` has written is read back by Pages with its bitmap; the pages that are not in
        the file are zero: `clear` them by Pages with the bitmap inverted, where the memory is not
        fresh.  Raises KernelError; ENODATA where the file is too short.
        """
        counts = ffi.new("struct cpr_page_counts *")
        error = lib.cpr_file_load(self.handle, pages.walk, fd, offset, counts)
        _check(error, f"reading pages of {pages.name} from descriptor {fd}")
        return _counts(counts)


class RecordWriter:
    """Makes the records of `pages`, which are of block `idstr`, for the section 'ram'.

    `continued`: the record before in the stream is of this block too.  It is true after the first
    record.
    """

    def __init__(self, pool: PagePool, pages: Pages, idstr: str, continued: bool = False) -> None:
        self._pool = pool
        self._pages = pages
        self._block = ffi.new("struct cpr_record_block *")
        name = idstr.encode()
        if len(name) > 255:
            raise ValueError(f"{idstr} is too long a name for a record")
        self._block.idstr_length = len(name)
        ffi.memmove(self._block.idstr, name, len(name))
        self._block.continued = continued

    @property
    def continued(self) -> bool:
        return bool(self._block.continued)

    def write(self, fd: int, budget: int = NO_LIMIT) -> PageCounts:
        """Writes records to `fd`, the caller's: a file, socket or pipe, blocking or not.

        Ends when `budget` bytes are written: no more, but at least one page.  `Pages.cancel` ends
        a wait for a non-blocking descriptor; shut a blocking socket down.  Raises KernelError;
        then a record may be cut.
        """
        counts = ffi.new("struct cpr_page_counts *")
        arguments = (self._pool.handle, self._pages.walk, self._block)
        error = lib.cpr_records_write(*arguments, fd, budget, counts)
        _check(error, f"writing pages of {self._pages.name} to descriptor {fd}")
        return _counts(counts)


class RecordLoader:
    """Takes the page records of a stream into the memory of its blocks.

    `blocks` are by idstr; of their bitmaps nothing is used.  A page that is zero in the stream is
    written only where it is not zero in memory, so that the holes of a fresh memfd stay.  All
    other records, and bad ones, are left to the caller, who sees them as the first thing not
    taken; `current` then is the idstr of the block that a CONTINUE means.
    """

    def __init__(self, pool: PagePool, blocks: Sequence[tuple[str, Pages]]) -> None:
        self._pool = pool
        self._names = [idstr for idstr, _ in blocks]
        self._keep = [(ffi.new("char[]", idstr.encode()), pages) for idstr, pages in blocks]
        self._blocks = ffi.new("struct cpr_load_block[]", len(blocks))
        for block, (idstr, pages) in zip(self._blocks, self._keep, strict=True):
            block.idstr = idstr
            block.idstr_length = len(idstr) - 1
            block.memory = pages.walk.memory
        self._load = ffi.new("struct cpr_load *")
        self._load.blocks = self._blocks
        self._load.count = len(blocks)
        self._load.current = -1

    @property
    def current(self) -> str | None:
        """The block of the last record; set it where the caller has taken the one before."""
        return None if self._load.current < 0 else self._names[self._load.current]

    @current.setter
    def current(self, idstr: str | None) -> None:
        self._load.current = -1 if idstr is None else self._names.index(idstr)

    @property
    def came(self) -> set[str]:
        """The blocks of which all the calls so far have taken pages."""
        return {name for name, block in zip(self._names, self._blocks, strict=True) if block.taken}

    @property
    def stopped(self) -> bool:
        """Whether the last call ended before a record that is not a page, not for lack of bytes."""
        return bool(self._load.stopped)

    @property
    def counts(self) -> PageCounts:
        """What all the calls so far have taken."""
        return _counts(self._load.counts)

    def feed(self, data: ReadableBuffer) -> int:
        """Takes the whole records at the start of `data`; returns their bytes.

        Raises KernelError.
        """
        source = ffi.from_buffer("uint8_t[]", data)
        taken = lib.cpr_load_bytes(self._pool.handle, self._load, source, len(source))
        _check(min(taken, 0), "loading pages")
        return int(taken)


def _check(error: int, operation: str) -> None:
    if error < 0:
        raise KernelError(operation, -error)


def _counts(counts: Any) -> PageCounts:
    return PageCounts(counts.zero, counts.normal, counts.bytes)


def _holes_of(block: RAMBlock) -> int:
    return block.fd if block.shared else -1


def _set_memory(memory: Any, host: int, count: int, fd: int) -> None:
    memory.host = ffi.cast("uint8_t *", host)
    memory.pages = count
    memory.fd = fd


def _words(bitmap: ReadableBuffer, pages: int) -> Any:
    """`bitmap` as C sees it, which keeps it alive."""
    words = ffi.from_buffer("uint64_t[]", bitmap)
    if len(words) * 8 < bitmap_size(pages):
        raise ValueError(f"a bitmap of {pages} pages has {bitmap_size(pages)} bytes")
    if int(ffi.cast("uintptr_t", words)) % 8:
        raise ValueError("a bitmap must be aligned to 8 bytes")
    return words
