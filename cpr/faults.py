"""Fault points: steps of an update that a test can make to fail, to hang, or to be killed.

CPR_FAULT in the environment is the path of a file.  While there is such a file with "STEP FAULT" in
it, the first process that comes to the step takes it away and does what it says:

    fail   raises RuntimeError, which nobody expects
    hang   does nothing any more, until there is a file PATH.go
    kill   SIGKILL

Without the variable a point is an empty function.
"""

from __future__ import annotations

import os

VARIABLE = "CPR_FAULT"
FAIL, HANG, KILL = "fail", "hang", "kill"
_path = os.environ.get(VARIABLE, "")


def _look(step: str) -> None:
    try:
        with open(_path) as file:
            named, fault = file.read().split()
        if named != step:
            return
        os.unlink(_path)
    except (OSError, ValueError):  # another process has come first
        return
    if fault == KILL:
        os.kill(os.getpid(), 9)
    elif fault == FAIL:
        raise RuntimeError(f"a fault at the step {step}")
    import time

    while not os.path.exists(f"{_path}.go"):
        time.sleep(0.01)


def _nothing(step: str) -> None:
    pass


point = _look if _path else _nothing
"""`point(step)`: a process of an update comes to this step."""
