"""RAM staging: RAM that a new image could not map is copied, while the guest runs, to one it can.

    Staging    makes a memfd for each such block, and puts it into the CPR state under its idstr
    live       passes over the dirty log, until what is left fits the downtime limit
    finish     the guest has stopped: the last dirty pages
    hand_over  another process has the copies now; this one keeps their descriptors, as a lock
    close      the inverse of all: the log off, the memfds gone, the state as it was

A pass takes the dirty log first and copies then, so that what is written meanwhile is in the next
one.  Without a log (TCG) there is one pass, in `finish`.
"""

from __future__ import annotations

import errno
import time
from _thread import allocate_lock

from cpr.constants import KIB, MIB, MS_PER_S, NS_PER_MS, NS_PER_S, PAGE_SIZE
from cpr.errors import ConfigError, KernelError, MigrationError
from cpr.free_memory import available
from cpr.migration.holder import abandon
from cpr.migration.rate import RateLimit
from cpr.page_bitmap import PageBitmap, existing_pages
from cpr.pages import NO_LIMIT, ZERO_CLEAR, ZERO_SKIP, PageCounts, PagePool, Pages
from cpr.ram_backend import create_copy, page_sizes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.migration.parameters import Parameters
    from cpr.migration.statistics import RamCounters
    from cpr.ram import RAMBlock
    from cpr.state.fds import PreservedFds

LEAST_PASS_NS = 50 * NS_PER_MS  # a log with little in it is not taken all the time


def wanted(machine: Machine, regenerates: bool, page_size: int) -> list[tuple[RAMBlock, int]]:
    """The blocks to copy, each with the page size that it is to have; `page_size` 0 is its own.

    `regenerates`: the new image makes the machine's own blocks again.  Raises MigrationError where
    a block cannot have such pages.
    """
    result = []
    for block in machine.blocks:
        if block.regenerated:
            if not (regenerates or block.preserved):
                result.append((block, PAGE_SIZE))
        elif block.reopened:
            if page_size not in (0, block.page_size):
                raise MigrationError(
                    f"x-cpr-ram-pagesize cannot move '{block.idstr}', whose RAM is in a file: put "
                    "that into a hugetlbfs of this page size"
                )
        elif not block.preserved or page_size not in (0, block.page_size):
            _check_page_size(block, page_size or block.page_size)
            result.append((block, page_size or block.page_size))
    return result


def _check_page_size(block: RAMBlock, page_size: int) -> None:
    if page_size not in page_sizes():
        known = ", ".join(str(size) for size in page_sizes())
        raise MigrationError(
            f"x-cpr-ram-pagesize: this host has no pages of {page_size} bytes, only of {known}"
        )
    if block.size % page_size:
        raise MigrationError(
            f"x-cpr-ram-pagesize: the size of '{block.idstr}', {block.size:#x}, is not a multiple "
            f"of the page size {page_size:#x}"
        )


class StagedBlock:
    """A block and its copy, which this owns."""

    def __init__(self, block: RAMBlock, page_size: int) -> None:
        """Raises ConfigError where there is no room for the copy."""
        self.block = block
        self.copy = create_copy(block, page_size)
        self.dirty = PageBitmap(block.size // PAGE_SIZE)
        self.all = Pages.of_block(block)
        self.some = Pages.of_block(block, self.dirty.words, holes=False)
        # Huge pages cannot be filled by writing to their file.
        self.target = Pages.of_block(self.copy, holes=page_size == PAGE_SIZE)

    def leave_out_missing(self) -> int:
        """Leaves out of `all` what is not there of anonymous memory; returns how many pages.

        What comes there later is written, and logged.
        """
        if self.block.fd >= 0:
            return 0
        try:
            existing = existing_pages(self.block.host, self.dirty.pages)
        except OSError:  # without /proc they are all read
            return 0
        self.all = Pages.of_block(self.block, existing.words)
        return existing.pages - existing.count()


class Staging:
    """The copies of `blocks`, for one migration; `regenerates` as for `wanted`.

    `counters` are kept up to date; `on_pass(number)` is called when a pass begins.  `live` and
    `finish` are for the migration thread, `cancel` for any.
    """

    def __init__(
        self,
        machine: Machine,
        fds: PreservedFds,
        parameters: Parameters,
        blocks: list[tuple[RAMBlock, int]],
        counters: RamCounters,
        on_pass: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Raises MigrationError where there is no memory for a copy; then nothing has changed."""
        self._machine = machine
        self._fds = fds
        self._parameters = parameters
        self._counters = counters
        self._on_pass = on_pass
        self._blocks: list[StagedBlock] = []
        self._own_fds: list[tuple[str, int]] = []
        self._pool: PagePool | None = None
        self._logging = False
        self._copied = False  # every page at least once
        self._cancelled = False
        self._wake = allocate_lock()
        self._wake.acquire()
        self._synced = 0  # ns
        self._bandwidth = 0  # bytes per second
        self._rate = RateLimit(lambda: int(parameters.get("max-bandwidth")), self._wait)
        try:
            _check_memory(blocks)
            for block, page_size in blocks:
                self._blocks.append(StagedBlock(block, page_size))
            self._pool = PagePool()
        except (ConfigError, KernelError) as error:
            self.close()
            raise MigrationError(f"x-cpr-ram-staging: {error}") from None
        self._enter()
        counters.total = sum(block.size for block, _ in blocks)
        counters.remaining = counters.total

    def _enter(self) -> None:
        """Puts the copies into the CPR state, in place of what is there."""
        for each in self._blocks:
            idstr = each.block.idstr
            own = self._fds.find(idstr, 0)
            if own is not None:
                self._own_fds.append((idstr, own))
                self._fds.delete(idstr, 0)
            self._fds.save(idstr, 0, each.copy.fd)
            each.block.copy_fd = each.copy.fd

    def _leave(self) -> None:
        """The inverse of `_enter`."""
        for each in self._blocks:
            if each.block.copy_fd >= 0:
                self._fds.delete(each.block.idstr, 0)
                each.block.copy_fd = -1
        for idstr, own in self._own_fds:
            self._fds.save(idstr, 0, own)
        self._own_fds = []

    def live(self) -> None:
        """Copies all pages, and then those that are written meanwhile, while the guest runs.

        Returns when the rest fits the downtime limit, and when it is cancelled.  Raises
        KernelError.
        """
        if not self._machine.accel.dirty_log:
            return
        for each in self._blocks:
            each.block.written = PageBitmap(each.dirty.pages)
        self._machine.accel.start_dirty_log()
        self._logging = True
        self._synced = time.monotonic_ns()
        self._begin_pass(self._counters.total // PAGE_SIZE)
        while True:
            self._pass(limited=True)
            if self._wait(self._synced + LEAST_PASS_NS - time.monotonic_ns()):
                return
            self._sync()
            if self._fits():
                return

    def finish(self) -> None:
        """Copies what is left of a guest that has stopped; without a limit.  Raises KernelError."""
        if self._logging:
            self._sync()
        else:
            self._begin_pass(self._counters.total // PAGE_SIZE)
        self._pass(limited=False)

    def cancel(self) -> None:
        """Ends `live` or `finish` soon."""
        self._cancelled = True
        for each in self._blocks:
            each.all.cancel()
            each.some.cancel()
        if self._wake.locked():
            self._wake.release()

    def _wait(self, ns: int) -> bool:
        """Waits so long, or until it is cancelled: then it returns true."""
        if not self._cancelled and ns > 0 and self._wake.acquire(timeout=ns / NS_PER_S):
            self._wake.release()
        return self._cancelled

    def _sync(self) -> None:
        """Adds what was written since the last time to the dirty pages, and begins a pass."""
        staged = {each.block.idstr: each for each in self._blocks}
        for section in self._machine.memory.sections:
            each = staged.get(section.block.idstr)
            if each is not None and not section.readonly:
                words = self._machine.accel.take_dirty_log(section.start, section.size)
                first = section.offset // PAGE_SIZE
                each.dirty.merge(first, words, section.size // PAGE_SIZE)
        for each in self._blocks:
            if each.block.written is not None:
                each.dirty.take(each.block.written)
        now = time.monotonic_ns()
        pages = sum(each.dirty.count() for each in self._blocks)
        new = pages - self._counters.remaining // PAGE_SIZE  # the others were so already
        self._counters.dirty_pages_rate = new * NS_PER_S // max(1, now - self._synced)
        self._synced = now
        self._begin_pass(pages)

    def _begin_pass(self, pages: int) -> None:
        self._counters.dirty_syncs += 1
        self._counters.remaining = pages * PAGE_SIZE
        self._on_pass(self._counters.dirty_syncs)

    def _fits(self) -> bool:
        """Whether what remains can be copied within the downtime limit, as QEMU reckons it."""
        counters = self._counters
        bandwidth = self._parameters.get("avail-switchover-bandwidth") or self._bandwidth
        if bandwidth:
            counters.expected_downtime = counters.remaining * MS_PER_S // bandwidth
        limit = self._parameters.get("downtime-limit")
        return counters.remaining * MS_PER_S <= bandwidth * limit

    def _pass(self, limited: bool) -> None:
        """Copies all pages the first time, else the dirty ones."""
        began, done = time.monotonic_ns(), PageCounts()
        for each in self._blocks:
            if not self._copied:
                self._account(PageCounts(zero=each.leave_out_missing()), PageCounts())
            pages = each.some if self._copied else each.all
            pages.position = 0
            while not pages.done and not self._cancelled:
                budget = self._rate.budget() if limited else NO_LIMIT
                if budget:
                    self._account(self._copy(each, pages, budget), done)
                if limited:
                    self._counters.precopy = self._counters.copied
            if not self._cancelled:
                each.dirty.clear()
        self._copied = True
        elapsed = max(1, time.monotonic_ns() - began)
        copied = done.bytes or done.zero * PAGE_SIZE
        if copied:
            self._bandwidth = copied * NS_PER_S // elapsed
            self._counters.pages_per_second = (done.normal + done.zero) * NS_PER_S // elapsed
            self._counters.mbps = done.bytes * 8 * 1000 / elapsed

    def _copy(self, each: StagedBlock, pages: Pages, budget: int) -> PageCounts:
        assert self._pool is not None
        zero_pages = ZERO_CLEAR if self._copied else ZERO_SKIP
        try:
            return self._pool.copy(pages, each.target, zero_pages, budget)
        except KernelError as error:
            if error.errno == errno.ECANCELED:
                return PageCounts()
            raise

    def _account(self, counts: PageCounts, done: PageCounts) -> None:
        self._rate.spend(counts.bytes)
        done.normal += counts.normal
        done.zero += counts.zero
        done.bytes += counts.bytes
        counters = self._counters
        counters.normal += counts.normal
        counters.duplicate += counts.zero
        counters.copied += counts.bytes
        counters.remaining -= (counts.normal + counts.zero) * PAGE_SIZE

    def park(self) -> None:
        """Ends the threads that copy, when all is copied."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def hand_over(self) -> None:
        """Frees all but the descriptors of the copies, which stay in the CPR state."""
        if self._logging:
            self._logging = False
            self._machine.accel.stop_dirty_log()
        for each in self._blocks:
            each.block.written = None
            each.copy.unmap()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def close(self) -> None:
        """Drops the copies: the guest's RAM is its own again.  May be called twice."""
        self.hand_over()
        self._leave()
        for each in self._blocks:
            abandon(each.copy)
            each.copy.close()
        self._blocks = []


def _check_memory(blocks: list[tuple[RAMBlock, int]]) -> None:
    """Raises MigrationError where there is no room for a second copy of what is there of them.

    Without that, memory would run out in the middle, and take the guest with it.
    """
    for size in sorted({page_size for _, page_size in blocks}):
        of_size = [block for block, page_size in blocks if page_size == size]
        spans = [(block.host, block.host + block.size) for block in of_size]
        try:
            # All of a huge page is there as soon as a byte of it is.
            need = _resident(spans) if size == PAGE_SIZE else sum(block.size for block in of_size)
            room = available(size)
        except OSError:  # without /proc there is nothing to go by
            return
        if need > room:
            raise MigrationError(
                f"x-cpr-ram-staging: the copy of RAM needs {need // MIB} MiB of memory and "
                f"{room // MIB} MiB are available: free some, raise the limit of this process's "
                "cgroup, or give the guest share=on RAM"
            )


def _resident(spans: list[tuple[int, int]]) -> int:
    """Bytes in memory or swap of these ranges of addresses (proc_pid_smaps(5))."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            word = line.split(None, 1)[0]
            if not word.endswith(":"):
                start = int(word.split("-")[0], 16)
                inside = any(low <= start < high for low, high in spans)
            elif inside and word in ("Rss:", "Swap:"):
                total += int(line.split()[1]) * KIB
    return total
