"""stderr of a program that starts: a memfd until it commits, so that its last words are known."""

from __future__ import annotations

import os
import sys

from cpr.constants import STDERR

NAME = "cpr-live-stderr"
LINK = f"/memfd:{NAME}"
PIECE = 64 << 10  # bytes
LAST_LINES = 20


class LastWords:
    """Of one update, in the old program.  Owns `real`, a copy of stderr, until `take`.

    `real` is -1 where there is no stderr: then nothing else happens either.
    """

    def __init__(self) -> None:
        self._memfd = -1
        try:
            self.real = os.dup(STDERR)
        except OSError:
            self.real = -1

    def divert(self) -> None:
        """stderr is the memfd, for the exec.  Raises OSError."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None:
                stream.flush()
        if self.real >= 0:
            self._memfd = os.memfd_create(NAME)
            os.dup2(self._memfd, STDERR)

    def restore(self) -> None:
        """In the guard, or where there is none, stderr is the real one."""
        if self._memfd >= 0:
            os.dup2(self.real, STDERR)

    def take(self) -> list[str]:
        """The last lines of the new program, which has ended; writes all that it had to stderr."""
        lines: list[str] = []
        if self._memfd >= 0:
            text = forward(self._memfd, STDERR)
            lines = text.decode(errors="replace").splitlines()[-LAST_LINES:]
        for fd in (self.real, self._memfd):
            if fd >= 0:
                os.close(fd)
        self.real = self._memfd = -1
        return lines


def forward(source: int, target: int) -> bytes:
    """Copies what a memfd holds; the end of it.  Nobody is to fail by what cannot be written."""
    offset, last = 0, b""
    while piece := os.pread(source, PIECE, offset):
        offset += len(piece)
        last = (last + piece)[-PIECE:]
        try:
            os.write(target, piece)
        except OSError:
            pass
    return last
