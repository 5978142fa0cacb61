"""Cancellation: what ends a thread's wait for a descriptor from another thread."""

from __future__ import annotations

import errno
import os
import select
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = "Switchover is interrupted"
"""What QEMU says of a migration that was cancelled."""


class Cancellation:
    """Waits that `cancel` ends, at any time and for good.  Owns an eventfd until `close`.

    `callback` is called by `cancel` too.  The constructor raises OSError.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.callback: Callable[[], None] | None = None
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = allocate_lock()  # a number that was closed may be another file's

    def cancel(self) -> None:
        """From any thread, and again; after `close` it does nothing but set `cancelled`."""
        self.cancelled = True
        with self._closing:
            if self._event >= 0:
                os.eventfd_write(self._event, 1)
        if self.callback is not None:
            self.callback()

    def check(self) -> None:
        """Raises OSError ECANCELED if it is cancelled."""
        if self.cancelled:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def wait(self, fd: int, events: int) -> None:
        """Waits until one of `events` (poll's) holds for `fd`.  Raises OSError ECANCELED."""
        poll = select.poll()
        poll.register(fd, events)
        poll.register(self._event, select.POLLIN)
        self.check()
        poll.poll()
        self.check()

    def sleep(self, ms: int) -> None:
        """Waits so long.  Raises OSError ECANCELED."""
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        poll.poll(ms)
        self.check()

    def close(self) -> None:
        """May be called twice."""
        with self._closing:
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)
