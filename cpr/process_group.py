"""A command in a process group of its own, so that what it has started ends with it."""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import os

from cpr.constants import SECCOMP_FILTER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen

    ReapLater = Callable[[int, Callable[[], None]], None]

END_SECONDS = 2.0  # for a command that was killed


def own_group() -> int | None:
    """`process_group` of subprocess.Popen: a new one, but none where a filter might kill the
    command for setpgid(2), as -sandbox elevateprivileges=deny does."""
    with open("/proc/self/status") as file:
        return None if SECCOMP_FILTER in file.read() else 0


def kill_group(process: Popen) -> bool:
    """Ends a command that was started so, with what it has started; from any thread, and again.

    False where it has become another user's, and nothing of it could be ended.
    """
    try:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it leads no group
            process.kill()
    except OSError:
        return False
    return True


def end_group(process: Popen, reap_later: ReapLater) -> int | None:
    """Kills it, closes its pipes and reaps it: its exit status.

    None where it does not end; then `reap_later(pid, reap)` is to have `reap()` called when it has.
    Nobody waits by the object any more.
    """
    pid = process.pid

    def reap() -> None:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:  # of a process that this one is the guard of
            pass

    killed = kill_group(process)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    if process.poll() is None and killed:
        import subprocess

        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    if process.returncode is None:
        process.returncode = -signal.SIGKILL  # else it warns when it is freed
        reap_later(pid, reap)
        return None
    return process.returncode
