"""RAM that has gone from one VMM to another by cpr-transfer: one of them runs its guest.

Whoever has the guest has locked its RAM, alone: the source until it has given it away, and then the
target.  That lock belongs to a process, and is free for a moment in each exec of the target, and
between a target that has become a source and the next one.  So a target also locks another byte of
the RAM, shared, as soon as it has it, and lets go when it has given the guest away: no earlier one
runs the guest meanwhile.  This lock belongs to its open file description, which is its own and goes
over its updates.  Whoever wants to run the guest again looks whether another one has that byte.

A copy of RAM that its source has given up, because the migration has failed or is cancelled, has no
permissions any more: a target that has it still, and that the source reaches in another migration,
does not take it for the guest's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress

from cpr.errors import CommandError, MigrationError
from cpr.ram_backend import LOCK_POLL, NO_LOCK
from cpr.uapi import file_lock

TYPE_CHECKING = False
LOCKED = (errno.EACCES, errno.EAGAIN)
NO_PERMISSIONS = 0  # of a memfd, which has all of them else

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cpr.ram import RAMBlock


def take_guest(blocks: Iterable[RAMBlock], wait_ns: int = 0) -> None:
    """Locks the guest's RAM for this process, waiting at most `wait_ns` for the one that has it.

    Raises CommandError with QEMU's text while another process has it.  A file system without locks
    has none.
    """
    deadline = time.monotonic_ns() + wait_ns
    for fd in _fds(blocks):
        while True:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
                break
            except OSError as error:
                if error.errno not in LOCKED:
                    break
                if time.monotonic_ns() >= deadline:
                    raise CommandError(NO_LOCK) from None
                time.sleep(LOCK_POLL)


def give_guest_away(blocks: Iterable[RAMBlock]) -> None:
    """Drops this process's lock on it; the inverse of `take_guest`."""
    for fd in _fds(blocks):
        with suppress(OSError):
            fcntl.lockf(fd, fcntl.LOCK_UN)


def abandon(copy: RAMBlock) -> None:
    """No target that has this copy of RAM runs a guest in it; before its lock is given up."""
    with suppress(OSError):
        os.fchmod(copy.fd, NO_PERMISSIONS)


def check_not_abandoned(blocks: Iterable[RAMBlock]) -> None:
    """In a target that has the lock.  Raises MigrationError where the source has given one up."""
    for block in blocks:
        came = block.kept and not block.reopened and block.fd >= 0
        if came and stat.S_IMODE(os.fstat(block.fd).st_mode) == NO_PERMISSIONS:
            raise MigrationError(
                f"'{block.idstr}' is of a migration that has not taken place: start this VMM "
                "again, and then the migration"
            )


def hold(blocks: Iterable[RAMBlock]) -> None:
    """In a target, which has the RAM and not yet the guest.  Raises nothing: a file system without
    locks has none.  `let_go` is the inverse."""
    for block in blocks:
        with suppress(OSError):
            if not block.reopened and block.fd >= 0:
                _make_own(block.fd)
            for fd in _fds([block]):
                file_lock.share(fd, file_lock.HOLDER)


def let_go(blocks: Iterable[RAMBlock]) -> None:
    """The next one has the guest; nothing happens where nothing is held."""
    for fd in _fds(blocks):
        with suppress(OSError):
            file_lock.unlock(fd, file_lock.HOLDER)


def take_again(blocks: Iterable[RAMBlock]) -> bool:
    """The inverse of `let_go`; false where another VMM has got the RAM from this one since."""
    fds = _fds(blocks)
    if any(_is_anothers(fd) for fd in fds):
        return False
    for fd in fds:
        with suppress(OSError):
            file_lock.share(fd, file_lock.HOLDER)
    return True


def _make_own(fd: int) -> None:
    """The open file description that came with it is the source's too.  Raises OSError."""
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(own, fd, inheritable=False)
    os.close(own)


def _fds(blocks: Iterable[RAMBlock]) -> list[int]:
    """What the other VMM finds this RAM by."""
    fds = [block.fd if block.reopened else block.outgoing_fd for block in blocks]
    return [fd for fd in fds if fd >= 0]


def _is_anothers(fd: int) -> bool:
    with suppress(OSError):
        return file_lock.is_locked(fd, file_lock.HOLDER)
    return False
