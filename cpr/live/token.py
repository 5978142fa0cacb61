"""The token of an update, and what else old and new image need without the C part.

Who has what an update is about is decided by one atomic act: the token, the count of an eventfd,
is read once.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import os
import select
import time

from cpr.constants import NS_PER_MS, STDERR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TOKEN = (1 << 64) - 2
"""The most that an eventfd counts (eventfd(2)): it becomes writable when this has been read."""

# Of /proc/PID/stat after the name: proc_pid_stat(5) counts from 1, and three more.
STATE_FIELD, TTY_FIELD, FLAGS_FIELD = 0, 4, 6
THREADS_FIELD, PROCESSOR_FIELD, EXIT_CODE_FIELD = 17, 36, 49
PF_USER_WORKER = 0x4000  # include/linux/sched.h: a worker of the kernel in a process of the user's
STATUS_TIMEOUT_NS = 100 * NS_PER_MS
DEATH_MS = 2000  # as in _native/guard_death.c
STEP = 0.0002  # s


class Returned:
    """How the old image came back: `outcome` is EARLY, DIED, KILLED or MESSAGE of the guard.

    `pid` is the process that the new image is or was in, `pidfd` its pidfd, which is the
    receiver's.  `consumed`: a program that knows no token had closed the CPR state; `dropped`: the
    descriptors that were to be dropped are closed.  `signalled` are the signals that end what is
    updated, and that it had not taken.
    """

    def __init__(
        self,
        outcome: int,
        pid: int,
        pidfd: int,
        consumed: bool = False,
        dropped: bool = False,
        signalled: frozenset[int] = frozenset(),
    ) -> None:
        self.outcome = outcome
        self.pid = pid
        self.pidfd = pidfd
        self.consumed = consumed
        self.dropped = dropped
        self.signalled = signalled


def above_streams(fd: int) -> int:
    """`fd`, or a copy in its place where it has the number of a stream that was closed.

    In the new image such a number is stdin, stdout or stderr.  Close-on-exec; the caller owns what
    comes back, and where it raises OSError nothing.
    """
    if fd > STDERR:
        return fd
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STDERR + 1)
    finally:
        os.close(fd)


def create_token() -> int:
    """A new token; the caller owns the descriptor, close-on-exec.  Raises OSError."""
    fd = above_streams(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    put_token_back(fd)
    return fd


def take_token(fd: int) -> bool:
    """Takes the token: true for exactly one of all that ever ask."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def put_token_back(fd: int) -> None:
    """The inverse of take_token, for who has it: it is there to be taken again."""
    os.eventfd_write(fd, TOKEN)


def is_readable(fd: int, timeout_ms: int | None = 0) -> bool:
    """Whether it is, or becomes so within the time; None waits.  A pidfd: its process has ended.

    By poll(2): select(2) takes no descriptor from 1024 on.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_ms))


def kill(pidfd: int) -> bool:
    """Kills the process of a pidfd; whether it has ended.

    False for another user's, and for one that stays in the kernel, at a file system that does not
    answer: that never runs its program again, and is not waited for without end.
    """
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return is_readable(pidfd, DEATH_MS)


def is_writable(fd: int, timeout_ms: int) -> bool:
    """Whether it is, or becomes so within the time."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout_ms))


def candidates(name: str, environment: Mapping[str, str]) -> list[str]:
    """The files that execvp(3) would try; only those that are there, or the last of all."""
    if not name or "/" in name:
        return [name] if name else []
    paths = [os.path.join(folder, name) for folder in os.get_exec_path(dict(environment))]
    return [path for path in paths if os.path.exists(path)] or paths[-1:]


def describe_status(status: int | None) -> str:
    """How a process has ended, for the end of a sentence that begins with what it was."""
    if status is None:
        return "has ended"
    if os.WIFSIGNALED(status):
        return f"was ended by signal {os.WTERMSIG(status)}"
    return f"has ended with exit status {os.WEXITSTATUS(status)}"


def pending_signals(pid: int, seen: frozenset[int] = frozenset()) -> frozenset[int]:
    """The signals that were sent to a process, also one that has just ended, and not taken yet.

    Where its parent has reaped it, those that were `seen` last.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            words = [line.split()[1] for line in file if line.startswith(("SigPnd:", "ShdPnd:"))]
    except OSError:
        return seen
    bits = 0
    for word in words:
        bits |= int(word, 16)
    return frozenset(number for number in range(1, 65) if bits >> (number - 1) & 1)


def read_stat(path: str) -> tuple[str, list[str]]:
    """The name in /proc/…/stat, and the fields after it.  Raises OSError."""
    with open(path) as file:
        head, _, fields = file.read().rpartition(")")
    return head.partition("(")[2], fields.split()


def leads_terminal() -> bool:
    """Whether the end of this process hangs up a terminal, as that of who leads its session."""
    if os.getsid(0) != os.getpid():
        return False
    try:
        return int(read_stat("/proc/self/stat")[1][TTY_FIELD]) != 0
    except OSError:  # nobody can tell
        return True


def is_kernels(fields: list[str]) -> bool:
    """Whether a thread is a worker of the kernel's (KVM, vhost, io_uring), by read_stat."""
    return bool(int(fields[FLAGS_FIELD]) & PF_USER_WORKER)


def is_worker(task: str) -> bool:
    """Whether a thread of this process, by its number, is the kernel's, or has ended meanwhile."""
    try:
        return is_kernels(read_stat(f"/proc/self/task/{task}/stat")[1])
    except OSError:
        return True


def tasks() -> frozenset[str]:
    """The numbers of this process's threads, the kernel's too.  Raises OSError."""
    return frozenset(os.listdir("/proc/self/task"))


def workers() -> frozenset[str]:
    """Those of `tasks` that are the kernel's, or have ended meanwhile.  Raises OSError."""
    return frozenset(filter(is_worker, tasks()))


def zombie_status(pid: int) -> int | None:
    """The wait status of a process that has ended and is not reaped yet, where it may be known."""
    try:
        fields = read_stat(f"/proc/{pid}/stat")[1]
        return int(fields[EXIT_CODE_FIELD]) if fields[STATE_FIELD] == "Z" else None
    except (OSError, IndexError, ValueError):
        return None


def wait_status(pid: int, ask: Callable[[], int | None]) -> int | None:
    """The wait status of a process that has ended and is not this one's child, or None.

    While it is a zombie /proc tells it, to who may trace it; then `ask()` may.  Waits a moment for
    one of the two.
    """
    deadline = time.monotonic_ns() + STATUS_TIMEOUT_NS
    while True:
        status = zombie_status(pid)
        if status is None:
            status = ask()
        if status is not None or time.monotonic_ns() > deadline:
            return status
        time.sleep(STEP)
