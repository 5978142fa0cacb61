"""Memory that the next program has too: a memfd, mapped shared.

It is sealed against becoming smaller: a new program that has not taken over, or is rehearsed, has
it too, and who accesses what is not there any more is ended by SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from cpr.live.errors import PreserveError

MFD_HUGETLB = 4  # memfd_create(2); os has no name for it before Python 3.13
MOST_NAME = 200  # bytes; memfd_create(2) takes 249


def create(name: str, size: int, huge: bool) -> int:
    """A new memfd of `size` bytes, zero-filled; the caller owns it.  Raises PreserveError."""
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise PreserveError(f"'{name}': a memory of {size!r} bytes cannot be made")
    _check_total(name, size)
    try:
        fd = os.memfd_create(
            f"cpr-live:{name}".encode()[:MOST_NAME].decode(errors="ignore"),
            os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (MFD_HUGETLB if huge else 0),
        )
    except OSError as error:
        what = "memfd_create of huge pages" if huge else "memfd_create"
        raise PreserveError(f"'{name}': {what}: {error.strerror}") from None
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except (OSError, OverflowError) as error:
        os.close(fd)
        why = error.strerror if isinstance(error, OSError) else error
        if huge:
            why = f"{why}; it has to be a multiple of Hugepagesize in /proc/meminfo"
        raise PreserveError(f"'{name}': {size} bytes of memory: {why}") from None
    return fd


def map_memory(fd: int, size: int, *, private: bool = False) -> mmap.mmap:
    """A mapping of `size` bytes of it; the descriptor stays the caller's.  Raises OSError."""
    return mmap.mmap(fd, size, mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)


def resize(name: str, fd: int, old: int, size: int, grow: bool) -> None:
    """Makes memory of `old` bytes larger where that is asked for.

    Raises PreserveError for every other size.
    """
    if size == old:
        return
    if not grow or size < old:
        hint = "" if size < old else "; grow=True makes it larger"
        raise PreserveError(f"'{name}' has {old} bytes, and {size} are asked for{hint}")
    _check_total(name, size)
    try:
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PreserveError(f"'{name}': {size} bytes of memory: {why}") from None


def give_back(fd: int, size: int) -> None:
    """The inverse of `resize`: what is beyond `size` bytes is freed, and zero again.

    Raises OSError.
    """
    beyond = os.fstat(fd).st_size - size
    if beyond <= 0:
        return
    with contextlib.suppress(OSError):  # one that an earlier version has not sealed
        os.ftruncate(fd, size)
        return
    with mmap.mmap(fd, size + beyond, mmap.MAP_SHARED) as whole:
        rest = min(-size % mmap.PAGESIZE, beyond)  # whole pages alone can be freed
        whole[size : size + rest] = bytes(rest)
        if beyond > rest:
            whole.madvise(mmap.MADV_REMOVE, size + rest, beyond - rest)


def _check_total(name: str, size: int) -> None:
    """A memfd takes any size, and who touches it is ended by SIGBUS or for want of memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise PreserveError(f"'{name}': {size} bytes of memory: the machine has {total}")
