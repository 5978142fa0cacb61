"""Whether the files of this program are still those that it was started from."""

from __future__ import annotations

import os
import sys

from cpr._native._cpr import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SUFFIXES = (".py", ".so")


class ProgramFiles:
    """What the files of this program were when it started: an upgrade in place replaces them.

    `record` notes that soon after the start, where no guest waits for it.
    """

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._names: list[Any] = []
        self._stamps: Any = None

    def record(self) -> None:
        """Looks at the interpreter and each file of this package.  Raises OSError."""
        self._paths = [sys.executable]
        for folder, _, names in os.walk(PACKAGE):
            self._paths += [os.path.join(folder, name) for name in names if name.endswith(SUFFIXES)]
        self._names = [ffi.new("char[]", os.fsencode(path)) for path in self._paths]
        self._stamps = self._look()

    def changed(self) -> list[str]:
        """The paths of those that are not what they were."""
        if self._stamps is None:
            self.record()
        now = self._look()
        if ffi.buffer(now)[:] == ffi.buffer(self._stamps)[:]:
            return []
        pairs = zip(self._paths, map(_values, now), map(_values, self._stamps), strict=True)
        return sorted(path for path, stamp, was in pairs if stamp != was)

    def _look(self) -> Any:
        stamps = ffi.new("struct cpr_file_stamp[]", len(self._names))
        lib.cpr_file_stamps(ffi.new("char *[]", self._names), len(self._names), stamps)
        return stamps


def _values(stamp: Any) -> tuple[int, int, int]:
    return stamp.device, stamp.inode, stamp.mtime_ns
