"""Who is killed first where memory runs out in an update (proc_pid_oom_score_adj(5)).

That should be the new image, which has nothing that would be lost with it.  It is small, and the
old one, in which everything goes on, has most of the memory in use.  So the old image says it of
the new one, from when that has memory of its own, and takes it back when it ends: the kernel would
let a process that root has said it of, and that is another user's by then, have no less.  The guard
in C does the same (_native/guard_death.c).
"""

from __future__ import annotations

import os

from cpr.constants import INIT

PATH = "/proc/{}/oom_score_adj"
MOST = "1000"  # OOM_SCORE_ADJ_MAX of linux/oom.h


def offer(pid: int) -> str:
    """The kernel kills that process first, until `withdraw`; nothing happens where that cannot be.

    Not the first process of a PID namespace, with which all others in it end, the old image too.
    Returns what it had before, "" where nothing has happened.
    """
    try:
        if pid == INIT or os.readlink("/proc/self") != str(os.getpid()):
            return ""  # of another PID namespace, with other numbers
        with open(PATH.format(pid), "r+") as file:
            before = file.read().strip()
            file.write(MOST)
    except OSError:
        return ""
    return before


def withdraw(pid: int | str, before: str) -> None:
    """The process, "self" for this one, has what `offer` has returned for it, or for its parent.

    Nothing happens where that cannot be: this one has become another user, say, and whoever has
    made the offer does it.
    """
    if before:
        try:
            with open(PATH.format(pid), "w") as file:
                file.write(before)
        except OSError:
            pass
