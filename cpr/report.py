"""Words for the user on stderr and stdout, which a guest must never wait for or be lost to.

    error_report(text)      cpr-vmm: TEXT
    warn_report(text)       cpr-vmm: warning: TEXT
    info_report(text)       cpr-vmm: info: TEXT
    exception_report(error) the traceback of an exception that nobody expected
    unexpected(error)       the same, and what is told of it elsewhere
    announce(text)          TEXT on stdout, such as the path of a pty
    output(text)            TEXT on stdout, all of it: the answer of a program that then ends

None of them raises.  All but `output` never block: what the other end does not take at once (a
pipe that nobody reads, a stopped terminal, a full disk) is dropped, from any thread.  They write
to the descriptors themselves: sys.stderr may be None, has a lock and a buffer.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time

from cpr import terminal
from cpr.constants import PROGRAM, STDERR, STDIN, STDOUT
from cpr.errors import CprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MAX_TEXT = 64 << 10
"""Bytes of one report; the rest is dropped."""

KIND = 32  # characters with which a report begins
MOST_KINDS = 1000  # the others are one
MOST_REPORTS = 1000
REPORTS_PER_S = 10
"""A guest can cause some of them, again and again, and the disk is its host's: so many at once, and
so many a second after that; the others are counted."""

PIECE = 512
"""Bytes that a descriptor which poll(2) calls writable takes without blocking, at the least."""

# Names from streams and files are shown: no control character of theirs reaches a terminal.
_SHOWN = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def error_report(text: object) -> None:
    """Says what is wrong."""
    _report(f"{PROGRAM}: {text}\n")


def warn_report(text: object) -> None:
    """Says what is odd, and costs the guest nothing."""
    _report(f"{PROGRAM}: warning: {text}\n")


def info_report(text: object) -> None:
    """Says what the user may wait for."""
    _report(f"{PROGRAM}: info: {text}\n")


def exception_report(error: BaseException) -> None:
    """Says where a bug showed: for exceptions that nobody expected, whom a guest outlives."""
    try:
        import traceback

        text = "".join(traceback.format_exception(error))
    except Exception:  # no memory, no descriptor for the import, an error that cannot be shown
        text = f"{PROGRAM}: internal error: {type(error).__name__}\n"
    _report(text)


def exhausted(error: BaseException) -> str:
    """What has run out, with the remedy, where that is why an exception was raised; else ""."""
    if isinstance(error, MemoryError):
        return "out of memory: raise RLIMIT_AS, or what else bounds it"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "out of descriptors: raise RLIMIT_NOFILE, or fs.file-max"
    return ""


def unexpected(error: BaseException) -> str:
    """What is told of an exception that nobody expected; where it showed goes to stderr, unless
    something has run out: that is nothing to look for in the program.
    """
    if text := exhausted(error):
        return text
    exception_report(error)
    return f"internal error: {str(error) or type(error).__name__}"


class _Limit:
    """How many reports of a kind may be made now: a token bucket."""

    def __init__(self) -> None:
        self._left = float(MOST_REPORTS)
        self._filled = 0.0
        self.left_out = 0

    def allows(self) -> bool:
        """Whether one more may be made, which counts."""
        now, before = time.monotonic(), self._filled
        self._filled = now
        self._left = min(self._left + (now - before) * REPORTS_PER_S, float(MOST_REPORTS))
        if self._left < 1:
            self.left_out += 1
            return False
        self._left -= 1
        return True


_limits: dict[str, _Limit] = {}
"""By how a report begins: a guest's mistakes keep back nothing else."""


def _report(text: str) -> None:
    kind = text[:KIND] if text[:KIND] in _limits or len(_limits) < MOST_KINDS else ""
    limit = _limits.setdefault(kind, _Limit())
    if limit.allows():
        left_out, limit.left_out = limit.left_out, 0
        more = f"{PROGRAM}: warning: {left_out} reports were left out\n" if left_out else ""
        _write(STDERR, more + text)


def carefully(step: Callable[[], object]) -> None:
    """Takes a step for which no guest that runs here already is to be lost."""
    try:
        step()
    except CprError as error:
        error_report(error)
    except Exception as error:
        exception_report(error)


def announce(text: str) -> None:
    """Writes a line to stdout."""
    _write(STDOUT, f"{text}\n")


def output(text: str) -> None:
    """Writes `text` to stdout and waits until it is taken; silent where nobody can take it."""
    data = memoryview(text.encode(errors="backslashreplace"))
    poll = select.poll()
    poll.register(STDOUT, select.POLLOUT)
    try:
        while data:
            try:
                data = data[os.write(STDOUT, data) :]
            except BlockingIOError:
                poll.poll()
    except OSError:
        pass


def open_standard_descriptors() -> None:
    """Puts /dev/null where stdin, stdout or stderr is closed; call it before anything is opened.

    Otherwise a disk image or a socket would get the number 2, and the words for stderr.
    """
    for fd, name, mode in ((STDIN, "stdin", "r"), (STDOUT, "stdout", "w"), (STDERR, "stderr", "w")):
        try:
            try:
                os.fstat(fd)
            except OSError:
                _open_null(fd)
            if getattr(sys, name) is None:  # Python found it closed; libraries expect a file
                setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115
        except OSError:
            pass  # there is no /dev/null: what is said vanishes all the same


def _open_null(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == fd:
        os.set_inheritable(fd, True)
    else:
        os.dup2(null, fd)
        os.close(null)


def _write(fd: int, text: str) -> None:
    try:
        shown = text.translate(_SHOWN).encode(errors="backslashreplace")
        _put(fd, memoryview(shown[:MAX_TEXT]))
    except Exception:  # nothing that goes wrong here is worth a guest, and nobody could be told
        pass


def _put(fd: int, data: memoryview) -> None:
    """Writes what can be written now.  Raises OSError for the rest."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        import socket

        sock = socket.socket(fileno=fd)
        try:
            while data:
                data = data[sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        finally:
            sock.detach()
        return
    twin = -1
    if stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd)):
        # O_NONBLOCK on `fd` itself would be everybody's who shares it, the user's shell among them.
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            twin = os.open(f"/proc/self/fd/{fd}", flags)
        except (FileNotFoundError, PermissionError):  # no /proc here, or another user's terminal
            _put_in_pieces(fd, data)
            return
    try:
        while data:
            data = data[terminal.write(fd if twin < 0 else twin, data) :]
    finally:
        if twin >= 0:
            os.close(twin)


def _put_in_pieces(fd: int, data: memoryview) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data and poll.poll(0) == [(fd, select.POLLOUT)]:
        data = data[terminal.write(fd, data[:PIECE]) :]
