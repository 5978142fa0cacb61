"""What a guard does not have of the old process, besides threads and locks."""

from __future__ import annotations

import signal
import sys

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class Kept:
    """From before an exec, in the old process, to `restore` in the guard, or where there is none.

    asyncio forgets its running loop in a child, and `random` takes a new seed there.  The interval
    timers of setitimer(2) and alarm(2) are no child's, but would go on in the new program, which
    they would end.  The descriptor of set_wakeup_fd is set again, for it warns of what it cannot
    write.
    """

    def __init__(self) -> None:
        self._events = sys.modules.get("asyncio.events")
        self._loop = self._events._get_running_loop() if self._events else None
        policy = getattr(self._events, "_event_loop_policy", None)
        self._policy, self._local = policy, getattr(policy, "_local", None)
        self._random = sys.modules.get("random")
        self._seed = self._random.getstate() if self._random else None
        self._timers = {each: signal.setitimer(each, 0) for each in TIMERS}
        try:
            self._wakeup = signal.set_wakeup_fd(-1)
        except ValueError:  # not the main thread
            self._wakeup = -1
        self._set_wakeup()

    def restore(self) -> None:
        if self._events is not None and self._loop is not None:
            self._events._set_running_loop(self._loop)
        if self._policy is not None and self._local is not None:
            self._policy._local = self._local
        if self._random is not None:
            self._random.setstate(self._seed)
        for timer, (left, interval) in self._timers.items():
            if left or interval:
                signal.setitimer(timer, left, interval)
        self._set_wakeup()

    def _set_wakeup(self) -> None:
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
