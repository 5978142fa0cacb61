"""The pty chardev: a pseudo terminal whose slave side can be opened, closed and opened again."""

from __future__ import annotations

import os
import select
import termios

from cpr import report
from cpr.chardev.base import CLOSED
from cpr.chardev.stream import FdChardev
from cpr.constants import NS_PER_MS
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.mainloop import MainLoop, Timer
    from cpr.state.connections import Kept

LOOK_NS = (
    200 * NS_PER_MS
)  # how often an unused pty is looked at; the kernel does not tell of an open


class PtyChardev(FdChardev):
    """Owns the master; `path` is the slave, in raw mode.  Says on stdout where a new one is."""

    backend = "pty"

    def __init__(self, label: str, loop: MainLoop, kept: Kept) -> None:
        super().__init__(label, loop)
        self._timer: Timer | None = None
        self._master = kept.take("master")
        if self._master >= 0:
            self.path = str(kept.data["path"])
        else:
            self._open()
        self._look()
        if self.connected:
            self.adopt_output(kept)

    def _open(self) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise ConfigError(f"Failed to create PTY: {error.strerror}") from None
        self.path = os.ttyname(slave)
        _set_raw(slave)
        os.close(slave)
        os.set_blocking(self._master, False)
        report.announce(f"char device redirected to {self.path} (label {self.label})")

    def describe(self) -> str:
        return f"pty:{self.path}"

    def save(self) -> Kept:
        kept = super().save()
        kept.data["path"] = self.path
        kept.fds["master"] = self._master
        return kept

    def unread(self) -> bool:
        return bool(self._poll() & select.POLLIN)

    def expect_another(self) -> None:
        self._look_later()

    def hang_up(self) -> None:
        """The slave was closed by its last user; the master waits for the next one."""
        with self._lock:
            for fd in self._watched:
                self.loop.unwatch(fd)
            self._watched.clear()
            self._pending.clear()
            self.in_fd = self.out_fd = -1
            self.connected = False
        self.event(CLOSED)
        self._tell_writable()
        self._look_later()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.connected:
            os.close(self._master)
        self._master = -1
        super().close()

    def _look(self) -> None:
        """Connects if the slave is open now, also where the last user's input is not all read."""
        if (self.connected and not self._hung_up) or self._master < 0:
            return
        if self._poll() & select.POLLHUP:
            self._look_later()
        else:
            if self.connected:
                self.event(CLOSED)
            self.attach_fds(self._master, self._master)

    def _poll(self) -> int:
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        return sum(events for _, events in poll.poll(0))

    def _look_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(LOOK_NS, self._look)


def _set_raw(fd: int) -> None:
    settings = termios.tcgetattr(fd)
    settings[0] = 0
    settings[1] &= ~termios.OPOST
    settings[2] = settings[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    settings[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(fd, termios.TCSANOW, settings)
