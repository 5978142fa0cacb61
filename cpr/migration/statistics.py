"""The figures of query-migrate: times, and what became of RAM."""

from __future__ import annotations

import time

PAGE_SIZE = 4096
NS_PER_MS = 1_000_000


class Times:
    """When a migration started, had its channel, stopped the guest, and ended; monotonic ns."""

    def __init__(self) -> None:
        self._started = time.monotonic_ns()
        self._set_up = self._stopped = self._ended = 0

    def set_up(self) -> None:
        self._set_up = time.monotonic_ns()

    def stop(self) -> None:
        self._stopped = time.monotonic_ns()

    def end(self) -> None:
        self._ended = time.monotonic_ns()

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
    """RAM of one migration: `total` and `transferred` in bytes, the others in pages."""

    def __init__(self) -> None:
        self.total = 0
        self.transferred = 0
        self.duplicate = 0
        self.normal = 0

    def query(self, times: Times) -> dict:
        """The `ram` of query-migrate."""
        seconds = times.total_ns / 1e9
        return {
            "total": self.total,
            "postcopy-requests": 0,
            "dirty-sync-count": 2,
            "multifd-bytes": 0,
            "pages-per-second": 0,
            "downtime-bytes": self.transferred,
            "page-size": PAGE_SIZE,
            "remaining": 0,
            "postcopy-bytes": 0,
            "mbps": self.transferred * 8 / seconds / 1e6 if seconds else 0,
            "transferred": self.transferred,
            "dirty-sync-missed-zero-copy": 0,
            "precopy-bytes": 0,
            "duplicate": self.duplicate,
            "dirty-pages-rate": 0,
            "normal-bytes": self.normal * PAGE_SIZE,
            "normal": self.normal,
        }
