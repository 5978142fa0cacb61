"""A file system that does not answer: FUSE without a daemon, in a mount namespace of its own.

For programs of tests, never for the test's own process: who asks the file system hangs, and others
than SIGKILL do not end that.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

HOLDER = """
import sys
from hung_mount import open_hung
open_hung(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""
NUMBER = 900  # which no update of others has
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18


def skip_without() -> None:
    """Skips the test where `open_hung` cannot work."""
    if os.geteuid() != 0:
        pytest.skip("a mount needs root")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse")


def open_hung(folder: Path | str) -> None:
    """Mounts it there, for this process alone, with the descriptor NUMBER on it."""
    mount(folder)
    os.dup2(os.open(folder, os.O_PATH | os.O_CLOEXEC), NUMBER)


def mount(folder: Path | str) -> int:
    """Mounts it there, for this process alone: the descriptor that a daemon has.

    When it is closed, who waits for the file system gets an error.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    for done in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"none", os.fsencode(folder), b"fuse", 0, options),
    ):
        if done != 0:
            raise OSError(ctypes.get_errno(), "mount(2)")
    return fuse


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """A process that has the descriptor NUMBER on it: its PID."""
    skip_without()
    words = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(words, stdin=PIPE, stdout=PIPE, env=environment()) as process:
        assert process.stdout.readline() == b"\n"
        yield process.pid


def environment() -> dict[str, str]:
    """That of a program which imports from the folder of this file and its parent."""
    folder = Path(__file__).resolve().parent
    return {**os.environ, "PYTHONPATH": f"{folder}:{folder.parent}"}
