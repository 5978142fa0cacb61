"""Who is killed first where memory runs out in an update (proc_pid_oom_score_adj(5)).

That should be the new image, which has nothing that would be lost with it.  It is small, and the
old one, in which everything goes on, has most of the memory in use.
"""

from __future__ import annotations

import os

from cpr.constants import INIT

PATH = "/proc/self/oom_score_adj"
MOST = "1000"  # OOM_SCORE_ADJ_MAX of linux/oom.h

_before = ""


def offer() -> None:
    """This process is the first to be killed, until `withdraw`.  Where that cannot be, nothing
    happens.

    Not between clone and exec: it would be so for all processes that share the memory.  And not as
    the first process of a PID namespace, with which all others in it end, the old image too.
    """
    global _before
    if _before or os.getpid() == INIT:
        return
    try:
        with open(PATH) as file:
            before = file.read().strip()
        _write(MOST)
    except OSError:
        return
    _before = before


def withdraw() -> None:
    """It is as it was before `offer`: everything is this process's now, or it becomes another user,
    who may not set it to less.  May be called again, where no descriptor was left."""
    global _before
    if _before:
        try:
            _write(_before)
        except OSError:
            return
        _before = ""


def _write(value: str) -> None:
    with open(PATH, "w") as file:
        file.write(value)
