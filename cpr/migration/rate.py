"""The rate limit of a migration, in bytes per second, which may change while it holds."""

from __future__ import annotations

import time

from cpr.constants import NS_PER_MS, NS_PER_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW_NS = 100 * NS_PER_MS  # QEMU's: what is not used within it is forgotten
SLICE = 16 << 20  # bytes at once where there is no limit, so that figures go on
LEAST = 4096  # what the smallest step may take


class RateLimit:
    """Gives out bytes: in any time t at most limit * (t + WINDOW), and less than a page more.

    `limit()` is bytes per second, 0 for none; `wait(ns)` waits, and returns true where it is of no
    use to go on.
    """

    def __init__(self, limit: Callable[[], int], wait: Callable[[int], bool]) -> None:
        self._limit = limit
        self._wait = wait
        self._credit = 0.0
        self._updated = time.monotonic_ns() - WINDOW_NS

    def budget(self) -> int:
        """Waits until there is something to give; the bytes that may be taken now, 0 for an end."""
        while True:
            limit = self._limit()
            if not limit:
                return SLICE
            now = time.monotonic_ns()
            most = max(limit * WINDOW_NS / NS_PER_S, LEAST)
            self._credit = min(self._credit + limit * (now - self._updated) / NS_PER_S, most)
            self._updated = now
            if self._credit >= LEAST:
                return int(min(self._credit, SLICE))
            missing = int((LEAST - self._credit) * NS_PER_S / limit) + 1
            if self._wait(min(missing, WINDOW_NS)):
                return 0

    def spend(self, size: int) -> None:
        """So many bytes were taken."""
        if self._limit():
            self._credit -= size
