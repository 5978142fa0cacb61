"""stderr of a program that starts: a memfd until it commits, so that its last words are known."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys

from cpr.constants import STDERR
from cpr.live import sealed
from cpr.live.token import above_streams

NAME = "cpr-live-stderr"
LINK = f"/memfd:{NAME}"
PIECE = 64 << 10  # bytes
BLOCK = 512  # bytes, of st_blocks
MOST = 16 << 20  # bytes that are kept; see `bound`
BOUND_MS = 100  # how often whoever waits for the new program looks at that
LAST_LINES = 20


class LastWords:
    """Of one update, in the old program.  Owns `real`, a copy of stderr, until `take`.

    `real` is -1 where there is no stderr, or where something that is not passed on has its number:
    then nothing else happens either.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._memfd = self.real = -1
        try:
            is_stream = os.get_inheritable(STDERR)
        except OSError:
            return
        if is_stream:
            self.real = fcntl.fcntl(STDERR, fcntl.F_DUPFD_CLOEXEC, STDERR + 1)

    def divert(self) -> None:
        """stderr is the memfd, for the exec.  Raises OSError."""
        flush()
        if self.real >= 0:
            self._memfd = create(NAME)
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
            close(self._memfd)
        if self.real >= 0:
            os.close(self.real)
        self.real = self._memfd = -1
        return lines


_bounded: set[int] = set()
"""The memfds of the update and the rehearsal that are under way."""


def create(name: str) -> int:
    """A memfd for what a program says, which `bound` looks after; `close` it.  Raises OSError."""
    memfd = above_streams(sealed.create(name))
    _bounded.add(memfd)
    return memfd


def close(memfd: int) -> None:
    """The inverse of `create`."""
    _bounded.discard(memfd)
    os.close(memfd)


def bound() -> None:
    """Forgets what the new program has said, but for the last, where that is too much to keep."""
    for memfd in _bounded:
        status = os.fstat(memfd)
        if status.st_blocks * BLOCK > MOST:
            offset = max(status.st_size - PIECE, 0)
            last = os.pread(memfd, PIECE, offset)
            os.ftruncate(memfd, 0)  # who writes on does so at the offset that he had
            os.pwrite(memfd, last, offset)


def end_of(memfd: int, size: int) -> str:
    """The last `size` bytes at most of what a program has said, as text."""
    begin = max(os.fstat(memfd).st_size - size, 0)
    return os.pread(memfd, size, begin).decode(errors="replace").strip("\0").strip()


def flush() -> None:
    """Writes what stdout and stderr have buffered; nobody is to fail by one that is closed."""
    for name in ("stdout", "stderr"):
        with contextlib.suppress(Exception):  # it may be of any class, and None
            getattr(sys, name).flush()


def forward(source: int, target: int) -> bytes:
    """Copies what a memfd holds, but for its holes; the end of it.

    Nobody is to fail by what cannot be written.  Who has the memfd still, as a child of the program
    may, says nothing more: nobody would read it, and it would grow.
    """
    with contextlib.suppress(OSError):  # one of an earlier version's
        fcntl.fcntl(source, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    size = os.fstat(source).st_size
    # Before that there is nothing but a hole, where it has been bounded.
    offset, last = max(size - 2 * MOST, 0), b""
    while offset < size and (piece := os.pread(source, min(PIECE, size - offset), offset)):
        offset += len(piece)
        piece = piece.strip(b"\0")
        last = (last + piece)[-PIECE:]
        try:
            os.write(target, piece)
        except OSError:
            pass
    return last
