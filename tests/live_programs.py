"""Runs small programs that update themselves, under a process that reaps what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 60  # s

SUPERVISOR = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
program = subprocess.Popen(sys.argv[1:])
while True:
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        break
program.returncode = 0
"""

PRELUDE = """
import json, os, sys, time
from cpr import live
def say(*words):
    os.write(1, (json.dumps(words) + "\\n").encode())
def fails(argv, **options):
    try:
        live.update(argv, **options)
    except live.UpdateError as error:
        return error
def wait_alone():  # the guard is reaped a moment after ready, on a busy machine by a thread
    for _ in range(5000):
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            if not (text := children.read()):
                break
        time.sleep(0.002)
    return text
PYTHON = sys.executable
"""


class Result:
    """The lines that `say` has written, and all of stderr."""

    def __init__(self, lines: list[Any], stderr: str) -> None:
        self.lines = lines
        self.stderr = stderr

    def of(self, word: str) -> list[Any]:
        """The rest of each line that begins with this word."""
        return [line[1:] for line in self.lines if line[0] == word]


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", SUPERVISOR, sys.executable, str(path), *arguments]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def write(folder: Path, source: str, name: str = "program.py") -> Path:
    path = folder / name
    path.write_text(PRELUDE + source)
    return path


def run(folder: Path, source: str, *arguments: str, **variables: str) -> Result:
    """Runs `source`, which may use `say`, `fails` and `live`, until it and all it left ended."""
    process = subprocess.Popen(
        command(write(folder, source), *arguments),
        env=environment(**variables),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, error = process.communicate()
        raise AssertionError(f"the program hangs: {out}\n{error}") from None
    try:
        return Result([json.loads(line) for line in out.splitlines()], error)
    except ValueError:
        raise AssertionError(f"{out}\n{error}") from None
