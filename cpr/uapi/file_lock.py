"""Locks on bytes of a file that belong to an open file description (fcntl(2), F_OFD_SETLK).

All copies of a descriptor have them together, in this process and in others, also over an exec;
they go when the last copy is closed.
"""

from __future__ import annotations

import fcntl
import os

from cpr._native._cpr import ffi, lib

GUEST = 300
"""The byte of a RAM file that whoever has a guest in it has locked; QEMU has those of images up to
there (block/file-posix.c)."""

HOLDER = 301
"""The byte of RAM that whoever has got it from another VMM has locked."""


def share(fd: int, byte: int) -> None:
    """Locks one byte so that others may do the same.  Raises OSError where somebody has it alone,
    or the file system has no locks.
    """
    fcntl.fcntl(fd, lib.F_OFD_SETLK, _lock(lib.F_RDLCK, byte))


def unlock(fd: int, byte: int, count: int = 1) -> None:
    """The inverse of `share`, for `count` bytes; those that are not locked are no error."""
    fcntl.fcntl(fd, lib.F_OFD_SETLK, _lock(lib.F_UNLCK, byte, count))


def is_locked(fd: int, byte: int) -> bool:
    """Whether another open file description has locked this byte.  Raises OSError."""
    answer = fcntl.fcntl(fd, lib.F_OFD_GETLK, _lock(lib.F_WRLCK, byte))
    lock = ffi.from_buffer("struct flock *", answer)
    return bool(lock.l_type != lib.F_UNLCK)


def held(fd: int) -> set[int] | None:
    """The bytes that this open file description has locked; None without a /proc that tells."""
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            lines = [line.split() for line in file if "OFDLCK" in line]
    except OSError:
        return None
    bytes_: set[int] = set()
    for *_, first, last in lines:
        if last != "EOF":
            bytes_.update(range(int(first), int(last) + 1))
    return bytes_


def _lock(kind: int, byte: int, count: int = 1) -> bytes:
    lock = ffi.new("struct flock *", {"l_type": kind, "l_whence": os.SEEK_SET})
    lock.l_start, lock.l_len = byte, count
    return bytes(ffi.buffer(lock))
