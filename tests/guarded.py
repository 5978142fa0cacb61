"""Runs a script that execs with a guard, in a process of its own under a subreaper."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Takes in whom the scripts leave, reaps them all, and says how each of them ended.
REAPER = """
import ctypes, json, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
child = os.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
while True:
    try:
        pid, status = os.waitpid(-1, 0x40000000)  # __WALL
    except ChildProcessError:
        break
    ended = {"ended": "first" if pid == child else "other", "status": status}
    os.write(1, (json.dumps(ended) + "\\n").encode())
"""
PRELUDE = f"""
import ctypes, errno, faulthandler, json, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from cpr.live import guard
from cpr.live import token as tokens
libc = ctypes.CDLL(None, use_errno=True)
OLD = os.getpid()
NAMES = {{guard.EARLY: "early", guard.DIED: "died", guard.KILLED: "killed",
         guard.MESSAGE: "message"}}
token, page = tokens.create_token(), guard.Page()

def execute(*argv, keep=(), **options):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return guard.execute(argv, os.environ, keep, token, page, mask=mask, **options)

def tell(**values):
    os.write(1, (json.dumps(values) + "\\n").encode())  # whole: another process writes too

def descriptors():
    return sorted(os.listdir("/proc/self/fd"))
"""


def run(script: str, *, timeout: float = 60.0) -> list[dict[str, Any]]:
    """What the script and all that it becomes has told, and how the processes ended."""
    done = subprocess.run(
        [sys.executable, "-c", REAPER, PRELUDE + script],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert "Traceback" not in done.stderr, done.stderr
    return told


def ends(told: list[dict[str, Any]]) -> dict[str, int]:
    """The wait status of the first process and of the other one."""
    return {each["ended"]: each["status"] for each in told if "ended" in each}


def only(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The one thing that was told."""
    (found,) = [each for each in told if "ended" not in each]
    return found
