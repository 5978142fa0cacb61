"""The socket chardev: a unix or TCP stream, as server (one client at a time) or as client.

Over an update that keeps connections both sockets go.  Else a server's listening socket is made
anew, at the same address: a unix path that is left over is unlinked first, as QEMU does.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket

from cpr import report
from cpr.chardev.address import SocketOptions, connect, join, listen, unlink
from cpr.chardev.stream import FdChardev
from cpr.constants import NS_PER_MS
from cpr.errors import ConfigError
from cpr.mainloop import READ, RETRY_NS, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.chardev.address import Address
    from cpr.mainloop import MainLoop, Timer
    from cpr.state.connections import Kept

MAX_PASSED_FDS = 16
LISTENER, PEER, PASSED = "listener", "peer", "passed"


class SocketChardev(FdChardev):
    """Owns the listening socket and the connection; a server closes a client that hangs up and
    then takes the next one, which waits in the backlog until then.

    Raises ConfigError where it can neither listen nor, as a client without reconnect-ms, connect.
    """

    backend = "socket"

    def __init__(
        self,
        label: str,
        loop: MainLoop,
        options: SocketOptions,
        kept: Kept | None = None,
        may_wait: bool = True,
    ) -> None:
        super().__init__(label, loop)
        self._options = options
        self._addresses: list[Address] = []
        self._listener: socket.socket | None = None
        self._socket: socket.socket | None = None
        self._connecting: socket.socket | None = None
        self._inode = 0
        self._timer: Timer | None = None
        self._gives_way = False
        self._had_waiting: bool | None = None
        self._passed: list[int] = []
        if kept is not None and kept.fds:
            self._adopt(kept)
            return
        self._resolve()
        if options.server:
            self._listen()
            if options.wait and may_wait:
                self._wait_for_client()
            else:
                self._watch_listener()
        elif options.reconnect_ms:
            self._reconnect()
        else:
            self._attach(connect(self._options, self._resolve()))

    def _resolve(self) -> list[Address]:
        """The addresses to try.  Raises ConfigError."""
        if not self._addresses:
            self._addresses = self._options.addresses()
        return self._addresses

    def describe(self) -> str:
        role = ",server=on" if self._options.server else ""
        if self._socket is None:
            bound = self._listener.getsockname() if self._listener else None
            where = self._options.text() if self._options.path or bound is None else _tcp(bound)
            return f"disconnected:{where}{role}"
        if self._options.path:
            return f"unix:{self._options.path}{role}"
        try:
            peer = _tcp(self._socket.getpeername()).removeprefix("tcp:")
        except OSError:  # it has reset the connection, and what it sent is not read yet
            peer = "disconnected"
        return f"{_tcp(self._socket.getsockname())}{role} <-> {peer}"

    def read_some(self, size: int) -> bytes:
        assert self._socket is not None
        if self._gives_way:
            self._gives_way = False
            assert self._listener is not None
            self._stop_timer()
            self.loop.unwatch(self._listener.fileno())
        if not self._options.path:
            return self._socket.recv(size)
        room = socket.CMSG_SPACE(MAX_PASSED_FDS * array.array("i").itemsize)
        data, ancillary, _, _ = self._socket.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        passed = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                passed.frombytes(payload[: len(payload) - len(payload) % passed.itemsize])
        if passed:
            self._close_passed()
            self._passed = list(passed)
        return data

    @property
    def takes_another(self) -> bool:
        return self._listener is not None

    def unread(self) -> bool:
        try:
            return self._socket is not None and bool(self._socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def take_fd(self) -> int:
        """The first descriptor of the last message that carried any; its others are closed.

        Those that nobody took are closed when another message brings new ones.
        """
        if not self._passed:
            return -1
        fd = self._passed.pop(0)
        self._close_passed()
        return fd

    def close_fds(self, fds: set[int]) -> None:
        peer, self._socket = self._socket, None
        if peer is not None:
            peer.close()
        self._close_passed()

    @property
    def where(self) -> dict[str, str | bool]:
        return self._options.where()

    def save(self) -> Kept:
        kept = super().save()
        kept.data["inode"] = self._inode
        kept.data["waiting"] = self._had_waiting
        sockets = {LISTENER: self._listener, PEER: self._socket}
        kept.fds = {role: each.fileno() for role, each in sockets.items() if each is not None}
        kept.fds |= {f"{PASSED}{number}": fd for number, fd in enumerate(self._passed)}
        return kept

    def _adopt(self, kept: Kept) -> None:
        listener, peer = kept.take(LISTENER), kept.take(PEER)
        if listener >= 0:
            self._listener = socket.socket(fileno=listener)
            self._inode = int(kept.data["inode"])
        if peer >= 0:
            self._attach(socket.socket(fileno=peer))
            self.adopt_output(kept)
            self._passed = [kept.take(role) for role in sorted(kept.fds, key=_number)]
            waiting = kept.data.get("waiting")
            if not (self._is_waited_for() if waiting is None else waiting):
                self._may_give_way()
        elif self._listener is not None:
            self._watch_listener()

    def _is_waited_for(self) -> bool:
        """Whether another client would be served."""
        waiting = select.poll()
        if self._listener is not None:
            waiting.register(self._listener, select.POLLIN)
        return bool(waiting.poll(0))

    def on_update(self) -> None:
        self._had_waiting = self._is_waited_for()

    def _may_give_way(self) -> None:
        """One who takes the connection for lost, as it is in other VMMs, connects anew: that one is
        served, unless the client has said something since the update.  Nobody had waited before
        that."""
        if self._listener is not None:
            self.expect_another()
            self._gives_way = True

    def start_over(self) -> None:
        if self._socket is not None:
            self.hang_up()

    def exec_fds(self) -> list[int]:
        return [each.fileno() for each in (self._socket, self._listener) if each is not None]

    def forget_exec_fds(self) -> None:
        if self._socket is not None:
            self._socket.detach()
            self.detach_fds()
        if self._listener is not None:
            self.loop.unwatch(self._listener.detach())
            self._listener = None
        self._stop_timer()
        self._stop_connecting()

    def reopen(self) -> None:
        if self._options.server:
            self._listen()
            self._watch_listener()
        elif self._options.reconnect_ms:
            self._reconnect_later()
        else:
            self._attach(connect(self._options, self._resolve()))

    def expect_another(self) -> None:
        if self._listener is not None and self._socket is not None:
            self._gives_way = False
            self._watch_listener()

    def hang_up(self) -> None:
        self.detach_fds()
        if self._listener is not None:
            self._watch_listener()
        elif self._options.reconnect_ms:
            self._reconnect_later()

    def close(self) -> None:
        self._stop_timer()
        self._stop_connecting()
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
            unlink(self._options.path, self._inode)
        super().close()

    # Server.

    def _listen(self) -> None:
        """Raises ConfigError."""
        self._listener, self._inode = listen(self._options, self._resolve())

    def _wait_for_client(self) -> None:
        """Blocks until the first client is there, as wait=on asks."""
        assert self._listener is not None
        report.info_report(f"QEMU waiting for connection on: {self.describe()}")
        self._listener.setblocking(True)
        client, _ = self._listener.accept()
        self._listener.setblocking(False)
        self._attach(client)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_listener(self) -> None:
        self._stop_timer()
        assert self._listener is not None
        self.loop.watch(self._listener.fileno(), READ, lambda _: self._accept())

    def _has_spoken(self) -> bool:
        """Whether the peer has said what is not read yet."""
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return self._socket is not None and bool(self._socket.recv(1, flags))
        except OSError:
            return False

    def _accept(self) -> None:
        assert self._listener is not None
        if self._gives_way and self._has_spoken():
            self._gives_way = False
            self.loop.unwatch(self._listener.fileno())
            return
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.loop.unwatch(self._listener.fileno())  # it is ready, and cannot be taken
                self._timer = self.loop.call_later(RETRY_NS, self._watch_listener)
            return  # or it has gone again
        self._stop_timer()
        self.loop.unwatch(self._listener.fileno())
        self._gives_way = False
        if self._socket is not None:
            self.detach_fds()
        self._attach(client)

    # Client.

    def _reconnect(self) -> None:
        self._timer = None
        try:
            family, address = self._resolve()[0]
        except ConfigError:  # no name server now
            self._reconnect_later()
            return
        try:
            peer = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # no descriptor now
            self._reconnect_later()
            return
        peer.setblocking(False)
        try:
            peer.connect(address)
        except BlockingIOError as problem:
            if problem.errno == errno.EAGAIN:  # a unix socket whose queue is full tells of no room
                peer.close()
                self._reconnect_later()
                return
            self._connecting = peer
            self.loop.watch(peer.fileno(), WRITE, lambda _: self._on_connected())
        except OSError:
            peer.close()
            self._reconnect_later()
        else:
            self._attach(peer)

    def _on_connected(self) -> None:
        peer, self._connecting = self._connecting, None
        assert peer is not None
        self.loop.unwatch(peer.fileno())
        if peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            peer.close()
            self._reconnect_later()
        else:
            self._attach(peer)

    def _stop_connecting(self) -> None:
        """The inverse of a `_reconnect` that still waits."""
        if self._connecting is not None:
            self.loop.unwatch(self._connecting.fileno())
            self._connecting.close()
            self._connecting = None

    def _reconnect_later(self) -> None:
        self._addresses = self._addresses[1:] + self._addresses[:1]
        self._timer = self.loop.call_later(self._options.reconnect_ms * NS_PER_MS, self._reconnect)

    # Both.

    def _attach(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        if not self._options.path and self._options.nodelay:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = peer
        self.attach_fds(peer.fileno(), peer.fileno())

    def _close_passed(self) -> None:
        while self._passed:
            os.close(self._passed.pop())


def _number(role: str) -> int:
    return int(role.removeprefix(PASSED))


def forget(kept: Kept) -> None:
    """Closes what a chardev has saved that is not there any more."""
    kept.close()
    unlink(str(kept.data.get("where", {}).get("path", "")), int(kept.data.get("inode", 0)))


def _tcp(address: Any) -> str:
    return f"tcp:{join(address[0], address[1])}"
