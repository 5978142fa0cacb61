"""What a guard does not have of the old process, besides threads and locks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from cpr.live.last_words import LastWords

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class Kept:
    """From before an exec, in the old process, to `restore` in the guard, or where there is none.

    In a child asyncio forgets its running loop, and from Python 3.14 on its tasks; `random` takes a
    new seed there.  The interval timers of setitimer(2) and alarm(2) are no child's, but would go
    on in the new program, which they would end.  The descriptor of set_wakeup_fd is set again, for
    it warns of what it cannot write.
    """

    def __init__(self) -> None:
        self._events = sys.modules.get("asyncio.events")
        self._loop = self._events._get_running_loop() if self._events else None
        self._tasks = sys.modules.get("asyncio.tasks")
        if self._tasks and self._loop:
            self._current = self._tasks.current_task(self._loop)
            self._all = self._tasks.all_tasks(self._loop)
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
            self._restore_tasks()
        if self._policy is not None and self._local is not None:
            self._policy._local = self._local
        if self._random is not None:
            self._random.setstate(self._seed)
        for timer, (left, interval) in self._timers.items():
            if left or interval:
                signal.setitimer(timer, left, interval)
        self._set_wakeup()

    def _restore_tasks(self) -> None:
        assert self._tasks is not None
        if self._current is not None and self._tasks.current_task() is None:
            self._tasks._enter_task(self._loop, self._current)
        if self._all - self._tasks.all_tasks():
            for task in self._all:  # all out of the old list first: they are linked to each other
                self._tasks._unregister_task(task)
            for task in self._all:
                self._tasks._register_task(task)

    def _set_wakeup(self) -> None:
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)


@contextlib.contextmanager
def for_the_exec(words: LastWords, blocked: Sequence[int], folder: str | None) -> Iterator[None]:
    """stderr, blocked signals and working directory are the new program's; afterwards as before.

    That is in the guard, where an exec within has made one.  Raises OSError.
    """
    kept, here = Kept(), -1
    try:
        if folder:
            here = os.open(".", os.O_PATH | os.O_CLOEXEC)  # it may have been removed
        words.divert()
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        if folder:
            os.chdir(folder)
        yield
    finally:
        kept.restore()
        words.restore()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        if here >= 0:
            os.fchdir(here)
            os.close(here)
