"""The files of the program that runs: whether its command is still this program."""

from __future__ import annotations

import os
import sys

TICK = 0.01  # s; the clock of the files' times is behind by one at most, with CONFIG_HZ=100


def changed_files(since: float) -> list[str]:
    """Those of the interpreter and of imported modules that are not as they were; sorted.

    `since` is in seconds since the epoch.  By the inode's change time, which nobody can set: a file
    that was only touched counts too, and so does one that is not to be found.
    """
    paths = {sys.executable} | {getattr(each, "__file__", None) for each in _modules()}
    found = []
    for path in paths:
        if not isinstance(path, str):  # it is built in, or a namespace package
            continue
        try:
            if _stat(path).st_ctime < since - TICK:
                continue
        except OSError:
            pass
        found.append(path)
    return sorted(found)


def _stat(path: str) -> os.stat_result:
    """Of a file in an archive, whose path goes through that: the archive's.  Raises OSError."""
    while True:
        try:
            return os.stat(path)
        except NotADirectoryError:
            path = os.path.dirname(path)


def _modules() -> list[object]:
    return [each for each in sys.modules.values() if each is not None]
