"""The token of an update, and what else old and new image need without the C part.

Who has what an update is about is decided by one atomic act: the token, the count of an eventfd,
is read once.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN = (1 << 64) - 2
"""The most that an eventfd counts (eventfd(2)): it becomes writable when this has been read."""


class Returned:
    """How the old image came back: `outcome` is EARLY, DIED, KILLED or MESSAGE of the guard.

    `pid` is the process that the new image is or was in, `pidfd` its pidfd, which is the
    receiver's.  `consumed`: a program that knows no token had closed the CPR state; `dropped`: the
    descriptors that were to be dropped are closed.
    """

    def __init__(self, outcome: int, pid: int, pidfd: int, consumed: bool, dropped: bool) -> None:
        self.outcome = outcome
        self.pid = pid
        self.pidfd = pidfd
        self.consumed = consumed
        self.dropped = dropped


def create_token() -> int:
    """A new token; the caller owns the descriptor, close-on-exec.  Raises OSError."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.eventfd_write(fd, TOKEN)
    return fd


def take_token(fd: int) -> bool:
    """Takes the token: true for exactly one of all that ever ask."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


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


def pending_signals(pid: int) -> frozenset[int]:
    """The signals that were sent to a process, also one that has just ended, and not taken yet."""
    try:
        with open(f"/proc/{pid}/status") as file:
            words = [line.split()[1] for line in file if line.startswith(("SigPnd:", "ShdPnd:"))]
    except OSError:
        return frozenset()
    bits = 0
    for word in words:
        bits |= int(word, 16)
    return frozenset(number for number in range(1, 65) if bits >> (number - 1) & 1)
