"""The main loop: descriptors, timers and calls from other threads, on one thread.

Monitors, chardevs and timers run here; vCPUs and the migration have threads of their own and
reach the loop with `call_soon`.
"""

from __future__ import annotations

import errno
import os
import select
import time
from _thread import allocate_lock, get_ident
from collections import deque
from heapq import heapify, heappop, heappush

from cpr import report
from cpr.constants import NS_PER_MS, NS_PER_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANGUP = select.EPOLLHUP
MAX_WAIT_NS = 3600 * NS_PER_S  # of one epoll_wait, which takes no more than 2^31 ms
NO_ROOM = (errno.ENOMEM, errno.ENOSPC)  # the latter: fs.epoll.max_user_watches
RETRY_NS = 200 * NS_PER_MS  # until what the kernel had no room for is tried again
FEW_TIMERS = 64  # so many may be cancelled before they are looked for


class Timer:
    """A one-shot timer; `cancel` is its inverse and may be called at any time."""

    __slots__ = ("callback", "deadline_ns")

    def __init__(self, deadline_ns: int, callback: Callable[[], None]) -> None:
        self.deadline_ns = deadline_ns
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class MainLoop:
    """An epoll loop.  All its descriptors are close-on-exec; it never owns the watched ones."""

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self._watched: dict[int, Callable[[int], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._round = 0
        self._timers: list[tuple[int, int, Timer]] = []
        self._sequence = 0
        self._compact_at = FEW_TIMERS
        self._lock = allocate_lock()
        self._stopped = False
        self._thread = 0

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls `callback(events)` on the loop while any of `events` holds for `fd`.

        A second call for the same fd replaces the first; the fd stays the caller's.  Where the
        kernel has no room for it now it is tried again.  Raises OSError for what cannot be watched.
        """
        try:
            self._add(fd, events)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.call_later(RETRY_NS, lambda: self._watch_again(fd, events, callback))
        self._watched[fd] = callback

    def _add(self, fd: int, events: int) -> None:
        try:
            if fd in self._watched:
                self._epoll.modify(fd, events)
                return
        except FileNotFoundError:  # there was no room, or it is closed, and another file by now
            pass
        self._epoll.register(fd, events)

    def _watch_again(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        if self._watched.get(fd) is callback:
            self.watch(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """The inverse of `watch`; call it before closing the fd.  Unknown fds are ignored."""
        if self._watched.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except (OSError, ValueError):
                pass

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Runs `callback` once on the loop; from any thread."""
        with self._lock:
            self._calls.append(callback)
        os.eventfd_write(self._wakeup, 1)

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """Runs `callback` when time.monotonic_ns() has reached `deadline_ns`; from any thread."""
        timer = Timer(deadline_ns, callback)
        with self._lock:
            self._sequence += 1
            if len(self._timers) >= self._compact_at:
                self._forget_cancelled()
            heappush(self._timers, (deadline_ns, self._sequence, timer))
        if get_ident() != self._thread:
            os.eventfd_write(self._wakeup, 1)
        return timer

    def call_later(self, delay_ns: int, callback: Callable[[], None]) -> Timer:
        return self.call_at(time.monotonic_ns() + delay_ns, callback)

    def _forget_cancelled(self) -> None:
        """A guest that arms a timer again and again leaves half the heap cancelled at most."""
        self._timers = [entry for entry in self._timers if entry[2].callback is not None]
        heapify(self._timers)
        self._compact_at = max(FEW_TIMERS, 2 * len(self._timers))

    def stop(self) -> None:
        """Makes `run` return; from any thread."""
        self._stopped = True
        os.eventfd_write(self._wakeup, 1)

    @property
    def stopping(self) -> bool:
        """Whether `run` is about to return."""
        return self._stopped

    def run(self) -> None:
        """Runs until `stop`."""
        self._thread = get_ident()
        while not self._stopped:
            self.iterate(None)
        self._stopped = False

    def iterate(self, timeout_ns: int | None) -> None:
        """One round: waits at most `timeout_ns` (None: for ever), then runs all that is due.

        What becomes due by that (a call, a timer that is armed again) has its turn in the next.
        A callback that waits for something may have rounds of its own meanwhile.
        """
        self._round = number = self._round + 1
        with self._lock:
            while self._timers and self._timers[0][2].callback is None:
                heappop(self._timers)
            if self._calls:
                timeout_ns = 0
            elif self._timers:
                due = max(0, self._timers[0][0] - time.monotonic_ns())
                timeout_ns = due if timeout_ns is None else min(due, timeout_ns)
        wait = None if timeout_ns is None else min(timeout_ns, MAX_WAIT_NS) / NS_PER_S
        ready = self._epoll.poll(wait)
        calls = len(self._calls)
        for fd, events in ready:
            if fd == self._wakeup:
                os.eventfd_read(self._wakeup)
            elif callback := self._watched.get(fd):
                _run(callback, events)
                if self._round != number:  # what is left was seen long ago
                    break
        while calls and self._calls:
            calls -= 1
            _run(self._calls.popleft())
        self._run_timers()

    def _run_timers(self) -> None:
        now = time.monotonic_ns()
        due = []
        with self._lock:
            while self._timers and self._timers[0][0] <= now:
                due.append(heappop(self._timers)[2])
        for timer in due:
            if timer.callback is not None:
                callback, timer.callback = timer.callback, None
                _run(callback)

    def close(self) -> None:
        self._epoll.close()
        os.close(self._wakeup)


def _run(callback: Callable[..., None], *arguments: Any) -> None:
    """Calls back; an exception is reported, but does not end the loop: a guest depends on it."""
    try:
        callback(*arguments)
    except Exception as error:
        report.exception_report(error)
