"""The stdio chardev: standard input and output; a terminal is put into character mode.

The terminal's settings are given back by `close`, and at exit.  An exec leaves them alone: the
new image finds a terminal in character mode already and gives back, in the end, what the old one
has found, or where it does not know that, what a terminal usually has (QEMU would leave it in
character mode).
"""

from __future__ import annotations

import atexit
import errno
import os
import stat
import termios

from cpr.chardev.base import CLOSED
from cpr.chardev.stream import FdChardev
from cpr.constants import NS_PER_MS
from cpr.errors import ConfigError
from cpr.state.connections import raw, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.mainloop import MainLoop, Timer
    from cpr.state.connections import Kept

STDIN, STDOUT = 0, 1
LOOK_NS = 200 * NS_PER_MS  # how often a job in the background looks whether it still is
IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6  # indices in termios.tcgetattr's list

# What character mode takes away; COOKED_* is what a terminal usually has of it.
RAW_IFLAG = (
    termios.IGNBRK
    | termios.BRKINT
    | termios.PARMRK
    | termios.ISTRIP
    | termios.INLCR
    | termios.IGNCR
    | termios.ICRNL
    | termios.IXON
)
RAW_LFLAG = termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN
COOKED_IFLAG = termios.ICRNL | termios.IXON
COOKED_LFLAG = termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG


class StdioChardev(FdChardev):
    """Only one can be open.  `signals`: whether Ctrl-C and the like stay signals.

    The descriptors 0 and 1 stay open and stay blocking; what is read and written are
    non-blocking twins of them, opened anew.  Where that cannot be (sockets), 0 and 1 themselves
    are made non-blocking until `close`.
    """

    backend = "stdio"
    _in_use = False

    def __init__(
        self, label: str, loop: MainLoop, signals: bool, after_exec: bool, kept: Kept
    ) -> None:
        super().__init__(label, loop)
        if StdioChardev._in_use:
            raise ConfigError("cannot use stdio by multiple character devices")
        StdioChardev._in_use = True
        self._made_nonblocking: list[int] = []
        self._signals = signals
        self._original: list[Any] | None = None
        self._look: Timer | None = None
        self._in_background = False
        self._on_continue_before: Any = None
        if (found := _settings()) is not None:
            self._original = _from_plain(kept) or (cooked(found) if after_exec else found)
            self._set_character_mode()
            loop.call_soon(self._watch_continue)
        atexit.register(self._restore)
        ended = kept.data.get("ended", False)
        self.attach_fds(
            -1 if ended else self._twin(STDIN, os.O_RDONLY, after_exec),
            self._twin(STDOUT, os.O_WRONLY, after_exec),
        )
        self.adopt_output(kept)

    def save(self) -> Kept:
        kept = super().save()
        kept.data["ended"] = self.in_fd < 0
        kept.data["terminal"] = _to_plain(self._original)
        return kept

    def room(self) -> int:
        """In the background nothing is read: SIGTTIN would stop this process with its guest."""
        if self._original is None:
            return super().room()
        if not _in_foreground():
            self._in_background = True
            if self._look is None:
                self._look = self.loop.call_later(LOOK_NS, self._on_look)
            return 0
        if self._in_background:
            self._set_character_mode()
        return super().room()

    def _on_look(self) -> None:
        """A shell tells nobody when a running job comes to the foreground."""
        self._look = None
        self._queue_update()

    def hang_up(self) -> None:
        """Standard input has ended; output goes on."""
        with self._lock:
            fd, self.in_fd = self.in_fd, -1
            if self._watched.pop(fd, None) is not None:
                self.loop.unwatch(fd)
        if fd >= 0:
            os.close(fd)
            self.event(CLOSED)

    def close(self) -> None:
        super().close()
        if self._look is not None:
            self._look.cancel()
        self._restore()
        if self._on_continue_before is not None:
            import signal

            signal.signal(signal.SIGCONT, self._on_continue_before)
        atexit.unregister(self._restore)
        StdioChardev._in_use = False

    def _twin(self, fd: int, access: int, after_exec: bool) -> int:
        """A close-on-exec descriptor for the same file as `fd`, non-blocking unless regular.

        -1 where `fd` is not open.
        """
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            return -1
        if not stat.S_ISREG(mode):
            flags = access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                return os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:
                if os.get_blocking(fd) or after_exec:
                    os.set_blocking(fd, False)
                    self._made_nonblocking.append(fd)
        return os.dup(fd)

    def _set_character_mode(self) -> None:
        """In the background it does nothing: the terminal is the shell's, and SIGTTOU would stop
        this process with its guest.  `room` makes up for it."""
        assert self._original is not None
        self._in_background = not _in_foreground()
        if self._in_background:
            return
        settings = list(self._original)
        settings[IFLAG] &= ~RAW_IFLAG
        settings[OFLAG] |= termios.OPOST
        settings[CFLAG] = settings[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        settings[LFLAG] &= ~RAW_LFLAG
        if not self._signals:
            settings[LFLAG] &= ~termios.ISIG
        settings[CC] = list(settings[CC])
        settings[CC][termios.VMIN], settings[CC][termios.VTIME] = 1, 0
        _set(settings)

    def _watch_continue(self) -> None:
        """After a stop (Ctrl-Z) and SIGCONT the shell has changed the settings: set them again."""
        import signal

        def on_continue(number: int, frame: object) -> None:
            if self._original is not None:
                self._set_character_mode()

        if self._original is not None:
            try:
                self._on_continue_before = signal.signal(signal.SIGCONT, on_continue)
            except ValueError:
                pass  # the loop does not run on the main thread, which alone may set handlers

    def _restore(self) -> None:
        for fd in self._made_nonblocking:
            os.set_blocking(fd, True)
        self._made_nonblocking = []
        original, self._original = self._original, None
        if original is not None and _in_foreground():
            _set(original)


def _to_plain(settings: list[Any] | None) -> list[Any] | None:
    """The control characters are bytes, or numbers where the terminal is in character mode."""
    if settings is None:
        return None
    plain = [text(each) if isinstance(each, bytes) else each for each in settings[CC]]
    return [*settings[:CC], plain]


def _from_plain(kept: Kept) -> list[Any] | None:
    plain = kept.data.get("terminal")
    if plain is None:
        return None
    return [*plain[:CC], [raw(each) if isinstance(each, str) else each for each in plain[CC]]]


def _settings() -> list[Any] | None:
    """The terminal's settings; None where stdin is none, or one that has hung up."""
    try:
        return termios.tcgetattr(STDIN)
    except termios.error:
        return None


def _set(settings: list[Any]) -> None:
    try:
        termios.tcsetattr(STDIN, termios.TCSANOW, settings)
    except termios.error:
        pass  # the terminal has gone


def _in_foreground() -> bool:
    """Whether this process may change the terminal; also where it is not its controlling one."""
    try:
        return os.tcgetpgrp(STDIN) == os.getpgrp()
    except OSError as error:
        return error.errno == errno.ENOTTY


def cooked(settings: list[Any]) -> list[Any]:
    """`settings`, with what character mode took away put back if it is in character mode."""
    result = list(settings)
    if not settings[LFLAG] & termios.ICANON:
        result[IFLAG] |= COOKED_IFLAG
        result[LFLAG] |= COOKED_LFLAG
    return result
