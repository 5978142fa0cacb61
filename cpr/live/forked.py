"""The guard by fork(): the same functions as `guard`, in Python alone.

The guard is a child that fork() has made.  It has copies of the private memory and shares what is
mapped shared; other threads, POSIX locks, KVM and io_uring do not come with it.
"""

from __future__ import annotations

import _signal as signal
import errno
import os
import select
import time

from cpr.constants import NS_PER_MS, NS_PER_S
from cpr.live import last_words, oom
from cpr.live.page import Page
from cpr.live.parentage import Parentage
from cpr.live.token import (
    Returned,
    candidates,
    is_readable,
    is_writable,
    kill,
    pending_signals,
    put_token_back,
    take_token,
    wait_status,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import Any

EARLY, DIED, KILLED, MESSAGE = 1, 2, 3, 4  # as in _native/guard.h
SIBLINGS = False
WALL = 0x40000000  # __WALL of wait(2): also children that were cloned without a signal
PATIENCE_NS = NS_PER_S  # as in _native/guard.c
NOTIFY_MS, STOPPED_MS = 1000, 10  # as in _native/guard.c
TICK_MS = 50  # how often it is looked at the hold, which no descriptor tells


_parentage: Parentage | None = None
"""Of the process that executed last."""
_offered = (0, "")
"""The new image's PID, and what oom.offer has returned for it."""


def wait_alone(known: frozenset[str] = frozenset()) -> None:
    """Other threads end in the guard and in the new image; who updates has looked at them."""


def execute(
    argv: Sequence[str],
    environment: Mapping[str, str],
    keep: Sequence[int],
    token: int,
    page: Page,
    *,
    mask: Iterable[int],
    early: bool = False,
    socket: int = -1,
    timeout_ns: int = 0,
    mappings: Sequence[tuple[int, int]] = (),
    state_fd: int = -1,
    kept_fd: int = -1,
    drop: Sequence[int] = (),
    unblock: Sequence[int] = (),
    ending: Sequence[int] = (),
    notify_fd: int = -1,
    sibling: bool = False,
    cpus: Collection[int] = (),
    ready: Callable[[], None] = lambda: None,
) -> Returned:
    """As guard.execute; `mappings`, `state_fd`, `drop` and `cpus` must be empty.  Raises OSError.

    There is no fork() with which the guard could be a `sibling`: it is a child.
    """
    if mappings or drop or cpus or state_fd >= 0:
        raise ValueError("a guard that was forked has no mappings, no CPUs and no CPR state")
    paths = candidates(argv[0], environment) if argv else []
    if not paths:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    ready()
    global _parentage
    _parentage = Parentage()
    old_pid = os.getpid()
    pidfd, exec_pipe = os.pidfd_open(old_pid), (-1, -1)
    try:
        exec_pipe = os.pipe()
        page.struct.exec_ns = time.monotonic_ns()
        if pid := _fork():
            page.struct.guard_pid = pid
            _tell(notify_fd, f"MAINPID={pid}", NOTIFY_MS if early else STOPPED_MS)
            handlers = _set_default(unblock)
            try:
                _forward(set(mask), set(unblock), pid)
                _execute(paths, list(argv), dict(environment), keep, token, pid, set(mask))
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
    except BaseException:  # in the process that was there before
        os.close(pidfd)
        for fd in exec_pipe:
            if fd >= 0:
                os.close(fd)
        raise
    watched = Watched(pidfd, old_pid, set(ending))
    outcome = _guard(watched, exec_pipe, token, page, early, socket, timeout_ns)
    _parentage.give_orphans()
    if outcome in (DIED, KILLED) and not watched.lives:
        adopted()
    return Returned(outcome, old_pid, pidfd, signalled=watched.signalled())


class Watched:
    """The new image: its pidfd, and those signals of `ending` that it has not taken."""

    def __init__(self, pidfd: int, pid: int, ending: set[int]) -> None:
        self.pidfd = pidfd
        self.lives = False
        self.pid = pid
        self._ending = ending
        self._pending = frozenset[int]()

    def signalled(self) -> frozenset[int]:
        """Those seen last, where it has ended."""
        self._pending = pending_signals(self.pid, self._pending)
        return self._pending & self._ending

    def kill(self) -> int:
        """Returns KILLED."""
        self.signalled()  # while it is there
        self.lives = not kill(self.pidfd)
        return KILLED


def _set_default(numbers: Iterable[int]) -> dict[int, Any]:
    """Signals that end the process from now on: a handler would run in a program that is gone a
    moment later.  The guard sees that end.  Returns what they had, for those that had a handler."""
    handlers = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
    except ValueError:  # not the main thread, which runs the handlers
        return {}
    return handlers


def _forward(mask: set[Any], unblock: set[Any], guard_pid: int) -> None:
    """What has come for the old image since its signals were blocked, and would be taken here."""
    for number in signal.sigpending() - mask - unblock:
        if callable(signal.getsignal(number)) and signal.sigtimedwait([number], 0) is not None:
            os.kill(guard_pid, number)


def _fork() -> int:
    try:
        return os.fork()
    except OSError as error:
        text = f"there is no process for the guard: {error.strerror}"
        raise OSError(error.errno, text) from None


def _tell(notify_fd: int, text: str, timeout_ms: int) -> None:
    """What the service's manager is told: the new image may end at once."""
    if notify_fd >= 0:
        try:
            if is_writable(notify_fd, timeout_ms):
                os.write(notify_fd, text.encode())
        except OSError:
            pass


def _execute(
    paths: Sequence[str],
    argv: list[str],
    environment: dict[str, str],
    keep: Sequence[int],
    token: int,
    guard_pid: int,
    mask: set[Any],
) -> None:
    """In the process that gets the new program: comes back only by an error, without a guard."""
    blocked: set[Any] = set()
    try:
        for fd in keep:
            os.set_inheritable(fd, True)
        blocked = signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _try_all(paths, argv, environment)
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for fd in keep:
            try:
                os.set_inheritable(fd, False)
            except OSError:  # it is not open, which has been told
                pass
        while not take_token(token):
            signal.pause()  # the guard was first: it ends this process, and goes on in its place
        os.kill(guard_pid, signal.SIGKILL)
        reap(guard_pid)
        put_token_back(token)


def _try_all(paths: Sequence[str], argv: list[str], environment: dict[str, str]) -> None:
    """As execvp(3).  Raises OSError."""
    error = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in paths:
        try:
            os.execve(path, argv, environment)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENOTDIR):
                error = failure
                if failure.errno != errno.EACCES:
                    break
        except ValueError as failure:  # a NUL byte, or a name with "="
            error = OSError(errno.EINVAL, str(failure))
            break
    raise error


def _guard(
    watched: Watched,
    exec_pipe: tuple[int, int],
    token: int,
    page: Page,
    early: bool,
    socket: int,
    timeout_ns: int,
) -> int:
    pidfd = watched.pidfd
    os.close(exec_pipe[1])
    poll = select.poll()
    for fd in (pidfd, exec_pipe[0]):
        poll.register(fd, select.POLLIN)
    ready = poll.poll(timeout_ns / NS_PER_MS if timeout_ns else None)
    os.close(exec_pipe[0])
    if not ready:  # the exec hangs
        if not take_token(token):  # the caller was first: it goes on, and ends this process now
            is_readable(pidfd, None)
            os._exit(0)
        return watched.kill()
    died = any(fd == pidfd for fd, _ in ready)
    if not died:
        global _offered
        page.score_before = before = oom.offer(watched.pid)
        _offered = watched.pid, before
    if not died and early:
        return EARLY
    outcome = DIED if died else _watch(watched, token, page, socket, timeout_ns)
    if outcome == MESSAGE:
        return outcome
    if not take_token(token):
        end()
    return watched.kill() if outcome == KILLED else outcome


def _watch(watched: Watched, token: int, page: Page, socket: int, timeout_ns: int) -> int:
    """Waits until the new image has the token, ends, speaks, or is past its deadline."""
    pidfd = watched.pidfd
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(token, select.POLLOUT)
    if socket >= 0:
        poll.register(socket, select.POLLIN)
    before, used_ns, signalled_ns = time.monotonic_ns(), 0, 0
    while True:
        ready = {fd for fd, _ in poll.poll(TICK_MS)}
        last_words.bound()
        if token in ready:
            end()
        if pidfd in ready:
            return DIED
        if socket in ready:
            return MESSAGE
        now = time.monotonic_ns()
        if not watched.signalled():
            signalled_ns = 0
        elif not signalled_ns:
            signalled_ns = now
        elif now - signalled_ns > PATIENCE_NS:
            return KILLED
        if not page.struct.hold:
            used_ns += now - before
        before = now
        if timeout_ns and used_ns > timeout_ns:
            return KILLED


def end(mappings: Sequence[tuple[int, int]] = ()) -> None:
    """The new image has committed: closes all descriptors and ends, without any exit handler."""
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))
    oom.withdraw(*_offered)  # there is a descriptor for that now
    os._exit(0)


def adopted() -> None:
    """The new image has ended: the signal at the parent's death is about the next parent's."""
    if _parentage is not None:
        _parentage.give_parent()


def reap(pid: int) -> None:
    """Waits for the guard, whichever kind it is."""
    try:
        os.waitpid(pid, WALL)
    except ChildProcessError:
        pass


def exit_status(pid: int, pidfd: int) -> int | None:
    """As token.wait_status; when it has been reaped the C part, if there is one, asks its pidfd."""

    def ask() -> int | None:
        try:
            from cpr.live import guard
        except ImportError:
            return None
        return guard.pidfd_status(pidfd)

    return wait_status(pid, ask)
