"""A timer on the guest's time: it stands still with the virtual clock while the VM is stopped."""

from __future__ import annotations

from cpr.constants import NS_PER_MS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.devices.base import Platform
    from cpr.mainloop import Timer

CATCH_UP_NS = 500 * NS_PER_MS
"""How far behind a periodic timer may be before it leaves ticks out instead of catching up."""

LEAST_PERIOD_NS = 200_000
"""Of a periodic timer, as KVM's own have it; a guest that asks for less gets this, and has not the
main loop for itself."""


class VirtualTimer:
    """Calls `callback(deadline)` on the main loop, with the lock held, once `deadline` has come.

    `deadline` is the time on the virtual clock that was asked for, in ns, or None.  The methods
    are for callers that hold the lock; the device passes on_run and on_stop on to `start` and
    `stop`.
    """

    def __init__(self, platform: Platform, callback: Callable[[int], None]) -> None:
        self.deadline: int | None = None
        self._platform = platform
        self._callback = callback
        self._armed: Timer | None = None
        self._arming = 0  # numbers what is armed, to know a callback that comes too late

    def set(self, deadline: int | None) -> None:
        """Replaces the deadline; None cancels the timer."""
        self.stop()
        self.deadline = deadline
        if self._platform.clock.enabled:
            self.start()

    def start(self) -> None:
        """The virtual clock runs."""
        self.stop()
        if self.deadline is not None:
            when = self._platform.clock.to_monotonic(self.deadline)
            arming = self._arming
            self._armed = self._platform.loop.call_at(when, lambda: self._expire(arming))

    def stop(self) -> None:
        """The virtual clock stands still; the deadline is kept."""
        self._arming += 1
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None

    def late(self, deadline: int) -> int:
        """From when on a periodic timer goes on: from its `deadline`, unless that is long past."""
        return max(deadline, self._platform.clock.now() - CATCH_UP_NS)

    def _expire(self, arming: int) -> None:
        with self._platform.lock:
            if arming == self._arming and self.deadline is not None:
                deadline = self.deadline
                self.set(None)
                self._callback(deadline)
