"""RAM that has gone from one VMM to another by cpr-transfer: no earlier one runs its guest.

The lock of `cpr_transfer.take_guest` belongs to a process, and is free for a moment in each exec of
the target, and between a target that has become a source and the next one.  So a target locks one
byte of the RAM, shared, as soon as it has it, by an open file description of its own, which its
updates take along; it lets go when it has given the guest away.  Whoever wants to run the guest
again looks whether another one has that byte.
"""

from __future__ import annotations

import os
from contextlib import suppress

from cpr.uapi import file_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cpr.ram import RAMBlock
    from cpr.state.fds import PreservedFds

SUFFIX = "/holder"  # of a block's name, for the descriptor that has the lock


def hold(blocks: Iterable[RAMBlock], fds: PreservedFds) -> None:
    """In a target, which has the RAM and not yet the guest.  Raises nothing: a file system without
    locks has none.  `let_go` is the inverse."""
    for block in blocks:
        with suppress(OSError):
            if not block.reopened and block.fd >= 0:
                flags = os.O_RDWR | os.O_CLOEXEC
                block.holder_fd = os.open(f"/proc/self/fd/{block.fd}", flags)
                fds.save_file(block.idstr + SUFFIX, 0, block.holder_fd)
            _lock(block)


def adopt(blocks: Iterable[RAMBlock], fds: PreservedFds) -> None:
    """In the new image of an update: the lock came with its descriptor."""
    for block in blocks:
        found = fds.take_file(block.idstr + SUFFIX, 0)
        if found is not None:
            block.holder_fd = found
            fds.save_file(block.idstr + SUFFIX, 0, found)


def let_go(blocks: Iterable[RAMBlock]) -> None:
    """The next one has the guest; nothing happens where nothing is held.

    No descriptor is closed: with that this process's other locks on the file would go.
    """
    for block in blocks:
        if (fd := _own(block)) >= 0:
            with suppress(OSError):
                file_lock.unlock(fd, file_lock.HOLDER)


def take_again(blocks: Iterable[RAMBlock]) -> bool:
    """The inverse of `let_go`; false where another VMM has got the RAM from this one since."""
    blocks = list(blocks)
    if any(_is_anothers(block) for block in blocks):
        return False
    for block in blocks:
        if block.holder_fd >= 0:
            with suppress(OSError):
                _lock(block)
    return True


def _lock(block: RAMBlock) -> None:
    if (fd := _own(block)) >= 0:
        file_lock.share(fd, file_lock.HOLDER)


def _own(block: RAMBlock) -> int:
    """A descriptor whose open file description no other VMM has, or -1."""
    return block.fd if block.reopened else block.holder_fd


def _is_anothers(block: RAMBlock) -> bool:
    fd = _own(block) if _own(block) >= 0 else block.outgoing_fd
    with suppress(OSError):
        return fd >= 0 and file_lock.is_locked(fd, file_lock.HOLDER)
    return False
