"""The connections of a VMM over an update; what is known of them is JSON in a sealed memfd.

Early: the old VMM sends all of it when the new one has the guest; until then, and if that does not
come about, it goes on serving them.  Late: descriptors and memfd go with the CPR state.  A new VMM
that begins to talk to clients moves the memfd's offset, which both see, to USED: if it then fails,
the old one knows that what it knows of its clients is not true any more.
"""

from __future__ import annotations

import os

from cpr.constants import NS_PER_S
from cpr.errors import KernelError, StateError
from cpr.live import sealed
from cpr.live.transaction import CONNECTIONS
from cpr.migration.hand_over import IDENTITY, decode_state, send
from cpr.state import connections
from cpr.state.connections import MOST, NAME, Kept
from cpr.state.cpr_state import CprState
from cpr.state.fds import write_memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.live.new_image import Predecessor
    from cpr.live.old_image import Update
    from cpr.state.fds import PreservedFds

USED = 1
UNSIZED = IDENTITY[:-1]  # somebody else may write to a file meanwhile
HANG_UP_NS = 10 * NS_PER_S  # the guest runs; an old VMM that has died hangs up at once


def send_all(update: Update, kept: dict[str, Kept]) -> None:
    """Early, the old VMM, as its last: nothing is read from a client here any more."""
    entries = [(NAME, 0, _memfd(kept)), *connections.descriptors(kept)]
    send(update, CONNECTIONS, {}, CprState(entries, []), b"")


def receive(predecessor: Predecessor) -> dict[str, Kept]:
    """Early, the new VMM: what the old one sends before it has closed all that it had.

    The descriptors are the caller's; none where it says nothing.  Raises StateError.
    """
    message = predecessor.wait_hang_up(HANG_UP_NS)
    if message is None:
        return {}
    try:
        if message.kind != CONNECTIONS:
            raise StateError(f"the old VMM sent '{message.kind}' when this one had the guest")
        (_, _, memfd), *entries = decode_state(message, UNSIZED).fds
        try:
            return connections.decode(_read(memfd), entries)
        except StateError:
            for _, _, fd in entries:
                os.close(fd)
            raise
        finally:
            os.close(memfd)
    finally:
        message.close()


def keep(fds: PreservedFds, kept: dict[str, Kept]) -> None:
    """Late, the old VMM: they go with the CPR state.  Raises KernelError."""
    fds.save(NAME, 0, _memfd(kept))
    for name, number, fd in connections.descriptors(kept):
        fds.save(name, number, fd)


def take_back(fds: PreservedFds, kept: dict[str, Kept]) -> bool:
    """The inverse of `keep`: whether the new VMM has talked to the clients meanwhile."""
    memfd = fds.find(NAME, 0)
    if memfd is None:
        return False
    for name, number, _ in connections.descriptors(kept):
        fds.delete(name, number)
    fds.delete(NAME, 0)
    used = os.lseek(memfd, 0, os.SEEK_CUR) == USED
    os.close(memfd)
    return used


def take(fds: PreservedFds) -> dict[str, Kept]:
    """Late, the new VMM: what has come with the CPR state, from now on the caller's.

    Raises StateError.
    """
    memfd = fds.find(NAME, 0)
    if memfd is None:
        return {}
    fds.delete(NAME, 0)
    try:
        data = _read(memfd)
        os.lseek(memfd, USED, os.SEEK_SET)
    finally:
        os.close(memfd)
    kept = connections.decode(data, fds.entries())
    for name, number, _ in connections.descriptors(kept):
        fds.delete(name, number)
    return kept


def _memfd(kept: dict[str, Kept]) -> int:
    """Sealed, at offset 0; the caller's.  Raises KernelError."""
    try:
        memfd = sealed.create(NAME)
    except OSError as error:
        raise KernelError("memfd_create", error.errno or 0) from error
    try:
        write_memfd(memfd, connections.encode(kept))
        os.lseek(memfd, 0, os.SEEK_SET)
        sealed.seal(memfd)
    except OSError as error:
        os.close(memfd)
        raise KernelError(f"write to memfd {NAME}", error.errno or 0) from error
    return memfd


def _read(memfd: int) -> bytes:
    """Raises StateError for what is not sealed."""
    try:
        return os.pread(memfd, sealed.check(memfd, MOST), 0)
    except ValueError as error:
        raise StateError(str(error)) from None
