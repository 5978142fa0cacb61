"""The figures of query-migrate: times, and what became of RAM."""

from __future__ import annotations

import time

from cpr.constants import NS_PER_MS, NS_PER_S, PAGE_SIZE

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


class UpdateTimes:
    """What an update has cost, as the new image knows it; CLOCK_MONOTONIC in ns.

    `began` when it was asked for, `executed` when the exec began, `stopped` when the guest stood
    still, `marks` when each phase of this image began; the guest runs from its "run" on.
    """

    def __init__(
        self, mode: str, began: int, executed: int, stopped: int, marks: dict[str, int]
    ) -> None:
        self.mode = mode
        moments = {"prepare": began, "exec": executed, "stop": stopped}
        moments |= {name: at for name, at in marks.items() if name not in moments}
        self._moments = sorted((at, name) for name, at in moments.items() if at)
        self.downtime_ns = max(0, marks["run"] - stopped) if stopped and "run" in marks else 0

    def phases(self) -> list[tuple[str, int]]:
        """(name, ns) of each phase, in order; the last one is not over."""
        pairs = zip(self._moments, self._moments[1:], strict=False)
        return [(name, until - at) for (at, name), (until, _) in pairs]

    def query(self) -> dict:
        """For query-migrate; none of it is in QEMU's answer."""
        return {
            "x-cpr-downtime-ns": self.downtime_ns,
            "x-cpr-update": self.mode,
            "x-cpr-phases": [{"name": name, "ns": ns} for name, ns in self.phases()],
        }

    def text(self) -> str:
        """One line of it."""
        phases = ", ".join(f"{name} {ns / NS_PER_MS:.2f}" for name, ns in self.phases())
        return (
            f"{self.mode} update: the guest stood still for {self.downtime_ns / NS_PER_MS:.2f} ms "
            f"(phases, ms: {phases})"
        )


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
        seconds = times.total_ns / NS_PER_S
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
