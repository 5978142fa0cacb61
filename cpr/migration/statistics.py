"""The figures of query-migrate: times, and what became of RAM."""

from __future__ import annotations

import time

from cpr.constants import PAGE_SIZE

NS_PER_MS = 1_000_000
STOPPED_SYNCS = 2  # QEMU's count where no page is written meanwhile


class Times:
    """When a migration started, had its channel, stopped the guest, and ended; monotonic ns."""

    def __init__(self) -> None:
        self._started = time.monotonic_ns()
        self._set_up = self._stopped = self._ended = 0

    def set_up(self) -> None:
        self._set_up = self._set_up or time.monotonic_ns()

    def stop(self) -> None:
        self._stopped = time.monotonic_ns()

    def end(self) -> None:
        self._ended = time.monotonic_ns()

    @property
    def stopped_ns(self) -> int:
        """When the guest was stopped; 0 if it has not been."""
        return self._stopped

    @property
    def total_ns(self) -> int:
        return (self._ended or time.monotonic_ns()) - self._started

    def query(self, completed: bool) -> dict:
        """setup-time and total-time, and downtime where it is over; in ms."""
        result = {
            "setup-time": max(0, self._set_up - self._started) // NS_PER_MS,
            "total-time": self.total_ns // NS_PER_MS,
        }
        if completed:
            result["downtime"] = max(0, self._ended - self._stopped) // NS_PER_MS
        return result


class RamCounters:
    """RAM of one migration.

    In bytes: `total`; `written` to the stream; `copied` in memory, `precopy` of that while the
    guest ran; what is `remaining`.  In pages: `duplicate` (zero) and `normal`.  `dirty_syncs` are
    the times that the dirty pages were looked up, which a stopped guest needs twice.
    """

    def __init__(self) -> None:
        self.total = 0
        self.written = 0
        self.copied = 0
        self.precopy = 0
        self.remaining = 0
        self.duplicate = 0
        self.normal = 0
        self.dirty_syncs = 0
        self.dirty_pages_rate = 0  # pages per second
        self.pages_per_second = 0
        self.mbps: float | None = None  # 10^6 bit/s of the last pass
        self.expected_downtime: int | None = None  # ms

    @property
    def transferred(self) -> int:
        return self.written + self.copied

    def query(self, times: Times) -> dict:
        """The `ram` of query-migrate."""
        seconds = times.total_ns / 1e9
        mbps = self.transferred * 8 / seconds / 1e6 if seconds else 0
        return {
            "total": self.total,
            "postcopy-requests": 0,
            "dirty-sync-count": self.dirty_syncs or STOPPED_SYNCS,
            "multifd-bytes": 0,
            "pages-per-second": self.pages_per_second,
            "downtime-bytes": self.transferred - self.precopy,
            "page-size": PAGE_SIZE,
            "remaining": self.remaining,
            "postcopy-bytes": 0,
            "mbps": mbps if self.mbps is None else self.mbps,
            "transferred": self.transferred,
            "dirty-sync-missed-zero-copy": 0,
            "precopy-bytes": self.precopy,
            "duplicate": self.duplicate,
            "dirty-pages-rate": self.dirty_pages_rate,
            "normal-bytes": self.normal * PAGE_SIZE,
            "normal": self.normal,
        }
