"""memfds of a hand-over: sealed when they are whole, so that what is checked is what is read.

The sender may keep its descriptor, and so may whoever got a copy: none can change a sealed memfd.
"""

from __future__ import annotations

import fcntl
import os

from cpr import mapped
from cpr.live.token import above_streams

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def create(name: str) -> int:
    """An empty memfd that can be sealed; close-on-exec, the caller's.  Raises OSError."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def create_sized(name: str, size: int) -> int:
    """One of `size` bytes for good, which anybody who has it may map: no access ends by SIGBUS.

    Close-on-exec, the caller's.  Raises OSError; then there is none.
    """
    import mmap  # not in the new image, whose guest may wait

    fd = above_streams(create(name))
    try:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as view:
            mapped.populate(view, fd)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS & ~fcntl.F_SEAL_WRITE)
    except OSError:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Nobody can write to it or resize it any more.  Raises OSError while it is mapped to write."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def check(fd: int, most: int) -> int:
    """Its size in bytes.  Raises ValueError for what is not sealed, or larger than `most`."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise ValueError("a descriptor of the hand-over is no memfd") from None
    if seals & SEALS != SEALS:
        raise ValueError(f"a memfd of the hand-over is not sealed: {seals:#x} of {SEALS:#x}")
    size = os.fstat(fd).st_size
    if size > most:
        raise ValueError(f"a memfd of the hand-over has {size} bytes, more than {most}")
    return size
