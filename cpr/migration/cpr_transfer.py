"""cpr-transfer: the guest goes to another VMM process on this host, which maps the same RAM.

    source                                    target (-incoming cpr channel, -incoming main channel)
    connect to the cpr socket                 listen there; nothing else is done before
    CPR state and descriptors, SHUT_WR   ──►  build the machine around them
    wait for the hang-up                 ◄──  listen on the main channel, close the cpr socket
    stop, device state on the main channel    load it, resume

The guest's owner holds a lock on its RAM, so that the source cannot run it as long as the target
does.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from contextlib import suppress

from cpr.errors import MigrationError, StateError
from cpr.faults import point
from cpr.migration import holder
from cpr.migration.address import check_unix_path
from cpr.migration.listener import listen_at
from cpr.migration.mode import TRANSFER, KeepsRam
from cpr.state import cpr_channel
from cpr.state.fds import MAX_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.mainloop import MainLoop
    from cpr.state.cpr_state import CprState
    from cpr.state.fds import PreservedFds

HANG_UP = select.EPOLLIN | select.EPOLLHUP | select.EPOLLRDHUP
MESSAGE_SIZE = 65536
MAX_DESCRIPTORS = 16  # of one message; QEMU sends one
MAX_ALL_DESCRIPTORS = 16384  # of one state: several devices, 2048 vectors each


def check_address(address: dict) -> str:
    """The path of a cpr channel's address.  Raises MigrationError with QEMU's text."""
    if address.get("transport") != "socket" or address.get("type") != "unix":
        raise MigrationError("bad cpr channel address; must be unix")
    check_unix_path(address["path"])
    return str(address["path"])


class Transfer(KeepsRam):
    """The source's side.  Owns its end of the cpr socket until the target hangs up."""

    regenerates = False

    def __init__(self, fds: PreservedFds, loop: MainLoop, address: dict, stages: bool) -> None:
        super().__init__(TRANSFER, stages)
        self._fds = fds
        self._loop = loop
        self._address = address
        self._socket: socket.socket | None = None
        self._unsent: list[tuple[bytes, int]] = []
        self._twins: list[int] = []  # what of the descriptors has not gone out yet

    def prepare(self, machine: Machine) -> None:
        """Takes the lock on the RAM that the target gets, which it cannot have before `finish`."""
        holder.take_guest(machine.blocks)

    def begin(self, go_on: Callable[[], None]) -> bool:
        """Sends the CPR state, as fast as the target takes it; nothing here waits for that."""
        path = check_address(self._address)
        self._socket = sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        self._unsent = cpr_channel.messages(self._fds.state())
        try:
            sock.connect(path)
            point("send")
            self._send()
            self._unsent = [(data, self._twin(fd)) for data, fd in self._unsent]
        except OSError as error:
            raise MigrationError(f"Failed to connect to '{path}': {error.strerror}") from None

        def on_event(events: int) -> None:
            if self._unsent and not events & (select.EPOLLHUP | select.EPOLLRDHUP):
                try:
                    self._send()
                except OSError:
                    self._unsent = []  # it has hung up: the main channel shows what it has
                self._loop.watch(sock.fileno(), self._events, on_event)
                return
            self._close()
            go_on()

        self._loop.watch(sock.fileno(), self._events, on_event)
        return True

    @property
    def _events(self) -> int:
        return HANG_UP | (select.EPOLLOUT if self._unsent else 0)

    def _send(self) -> None:
        """Sends what goes out at once.  Raises OSError."""
        assert self._socket is not None
        while self._unsent:
            data, fd = self._unsent[0]
            try:
                sent = socket.send_fds(self._socket, [data], [fd] if fd >= 0 else [])
            except BlockingIOError:
                return
            self._unsent[:1] = [(data[sent:], -1)] if sent < len(data) else []
        self._socket.shutdown(socket.SHUT_WR)

    def _twin(self, fd: int) -> int:
        """A duplicate, as a device may close its own while the target is slow.

        None of RAM, which no device closes: that duplicate's end would take this process's lock.
        """
        if fd >= 0 and not stat.S_ISREG(os.fstat(fd).st_mode):
            fd = os.dup(fd)
            self._twins.append(fd)
        return fd

    def finish(self, machine: Machine) -> None:
        super().finish(machine)
        point("given-away")

    def rollback(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None
        _close_all(self._twins)
        self._twins = []
        self._unsent = []


class CprListener:
    """The target's side: waits for a source on a unix socket and takes its state.

    The connection stays open until `close`: its end tells the source that this process now listens
    on the main channel.
    """

    def __init__(self, address: dict) -> None:
        """Receives the state; blocks until a source has sent it.  Raises MigrationError."""
        if address.get("type") != "unix":
            raise MigrationError("bad cpr channel socket type; must be unix")
        path = address["path"]
        check_unix_path(path)
        try:
            listener = listen_at(path)
        except OSError as error:
            raise MigrationError(f"Failed to bind socket to {path}: {error.strerror}") from None
        try:
            self._connection = listener.accept()[0]
        except OSError as error:
            raise MigrationError(f"Failed to accept the source: {error.strerror}") from None
        finally:
            listener.close()
            with suppress(OSError):  # somebody else may have removed it
                os.unlink(path)

    def receive(self) -> CprState:
        """The state; its descriptors, close-on-exec, are the caller's.

        Raises StateError; then no descriptor stays open.
        """
        data, descriptors = bytearray(), []
        try:
            point("receive")
            while True:
                piece, fds, _, _ = socket.recv_fds(self._connection, MESSAGE_SIZE, MAX_DESCRIPTORS)
                descriptors += fds
                if not piece:
                    break
                data += piece
                if len(data) > MAX_SIZE or len(descriptors) > MAX_ALL_DESCRIPTORS:
                    raise StateError(
                        f"the cpr channel has more than {MAX_SIZE} bytes or "
                        f"{MAX_ALL_DESCRIPTORS} descriptors: its sender is no VMM"
                    )
            return cpr_channel.decode(bytes(data), descriptors)
        except OSError as error:
            _close_all(descriptors)
            raise StateError(
                f"Unable to read from the cpr channel: {error.strerror}; start this VMM again, "
                "and then the migration"
            ) from None
        except BaseException:
            _close_all(descriptors)
            raise

    def close(self) -> None:
        self._connection.close()


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
