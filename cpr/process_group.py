"""A command in a process group of its own, so that what it has started ends with it."""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from subprocess import Popen

SECCOMP_FILTER = "Seccomp:\t2\n"  # SECCOMP_MODE_FILTER of linux/seccomp.h, in proc_pid_status(5)


def own_group() -> int | None:
    """`process_group` of subprocess.Popen: a new one, but none where a filter might kill the
    command for setpgid(2), as -sandbox elevateprivileges=deny does."""
    with open("/proc/self/status") as file:
        return None if SECCOMP_FILTER in file.read() else 0


def kill_group(process: Popen) -> None:
    """Ends a command that was started so, with what it has started; from any thread, and again."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it leads no group
        process.kill()
    except OSError:
        pass  # it has become another user's
