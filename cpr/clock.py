"""The virtual clock: ns that the guest has been running; stands still while the VM is stopped."""

from __future__ import annotations

import time


class VirtualClock:
    """Counts ns while enabled.  It starts disabled at `offset_ns`."""

    def __init__(self, offset_ns: int = 0) -> None:
        self.enabled = False
        self._offset_ns = offset_ns
        self._started_ns = 0

    def now(self) -> int:
        """The guest's time in ns."""
        if not self.enabled:
            return self._offset_ns
        return self._offset_ns + time.monotonic_ns() - self._started_ns

    def enable(self, now_ns: int | None = None) -> None:
        """Lets it go on from `now_ns` of time.monotonic_ns(); `disable` is the inverse."""
        if not self.enabled:
            self._started_ns = time.monotonic_ns() if now_ns is None else now_ns
            self.enabled = True

    def disable(self, now_ns: int | None = None) -> None:
        if self.enabled:
            now = time.monotonic_ns() if now_ns is None else now_ns
            self._offset_ns += now - self._started_ns
            self.enabled = False

    def set(self, offset_ns: int) -> None:
        """Sets a disabled clock, as a load of the migration stream does."""
        if self.enabled:
            raise ValueError("the virtual clock is set only while the VM is stopped")
        self._offset_ns = offset_ns

    def to_monotonic(self, guest_ns: int) -> int:
        """The time.monotonic_ns() at which this clock, kept enabled, shows `guest_ns`."""
        return time.monotonic_ns() + guest_ns - self.now()
