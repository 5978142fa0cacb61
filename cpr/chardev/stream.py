"""FdChardev: buffered output and flow-controlled input over descriptors, on the main loop."""

from __future__ import annotations

import errno
import os
import select
import time
from _thread import RLock

from cpr import terminal
from cpr.chardev.base import CLOSED, MAX_WAITING, OPENED, Chardev
from cpr.mainloop import READ, WRITE
from cpr.state.connections import raw, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.mainloop import MainLoop
    from cpr.state.connections import Kept

READ_SIZE = 65536
# After so much of one peer's input the loop's other descriptors get their turn.
READS_PER_ROUND = 256
BYTES_PER_ROUND = 16384
HANGUP = select.EPOLLRDHUP
GONE = select.EPOLLHUP | select.EPOLLERR  # the peer reads nothing either
NO_MEMORY = (errno.ENOBUFS, errno.ENOMEM)  # for now: nobody has gone


class FdChardev(Chardev):
    """A chardev over `in_fd` and `out_fd`, which may be the same one; -1 is none.

    Subclasses open the descriptors, non-blocking where that means something, and hand them over
    with `attach_fds`; `detach_fds` closes them again.  Descriptors that epoll refuses (regular
    files, /dev/null) are always ready.
    """

    def __init__(self, label: str, loop: MainLoop) -> None:
        super().__init__(label, loop)
        self.in_fd = -1
        self.out_fd = -1
        self._write: Callable[[int, memoryview], int] = os.write
        self._pending = bytearray()
        self._watched: dict[int, int] = {}
        self._lock = RLock()
        self._update_queued = False
        self._read_queued = False
        self._hung_up = False
        self._ended = False  # all that the peer will ever send is read
        self._reads_nothing = False  # nor will the peer ever; what it sent is not read yet
        self._tells_writable = False  # the frontend waits for `writable`

    def attach_fds(self, in_fd: int, out_fd: int) -> None:
        """Owns the descriptors from now on and tells the frontend that a peer is there."""
        with self._lock:
            self.in_fd, self.out_fd = in_fd, out_fd
            self._write = terminal.write if out_fd >= 0 and os.isatty(out_fd) else os.write
            self._pending.clear()
            self._hung_up = self._ended = self._reads_nothing = False
            self.connected = True
        self.event(OPENED)
        self._queue_update()

    def detach_fds(self) -> None:
        """Closes the descriptors; what had not gone out is lost with them.  On the loop."""
        with self._lock:
            for fd in self._watched:
                self.loop.unwatch(fd)
            self._watched.clear()
            fds = {self.in_fd, self.out_fd} - {-1}
            self.in_fd = self.out_fd = -1
            self._pending.clear()
            was_connected, self.connected = self.connected, False
        self.close_fds(fds)
        if was_connected:
            self.event(CLOSED)
        self._tell_writable()

    def close_fds(self, fds: set[int]) -> None:
        for fd in fds:
            os.close(fd)

    def save(self) -> Kept:
        kept = super().save()
        with self._lock:
            kept.data["output"] = text(self._pending)
        return kept

    def adopt_output(self, kept: Kept) -> None:
        """Goes on with what another image has not got rid of; for whoever has just attached."""
        with self._lock:
            self._pending += raw(kept.data.get("output", ""))
            self._tells_writable = bool(self._pending)
        self._queue_update()

    def start_over(self) -> None:
        with self._lock:
            self._pending.clear()
        if self.connected:
            self.event(CLOSED)
            self.event(OPENED)
        self._tell_writable()

    @property
    def waiting(self) -> int:
        return len(self._pending)

    def write(self, data: bytes) -> None:
        with self._lock:
            if self.out_fd < 0 or len(self._pending) >= MAX_WAITING:
                return
            if not self._pending:
                data = data[self._send(data) :]
            if data:
                self._pending += data
                self._tells_writable = True
                self._queue_update()

    def try_write(self, data: bytes) -> int:
        with self._lock:
            if self.out_fd < 0:
                return len(data)
            sent = 0 if self._pending else self._send(data)
            if sent < len(data):
                self._tells_writable = True
                self._queue_update()
            return sent

    def flush(self, timeout_ns: int = 0) -> None:
        deadline = time.monotonic_ns() + timeout_ns
        while True:
            with self._lock:
                self._drain()
                fd = self.out_fd
                left = deadline - time.monotonic_ns()
                if fd < 0 or not self._pending or left <= 0:
                    return
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll(left / 1e6)

    def accept_input(self) -> None:
        if self.in_fd >= 0 and not self._watched.get(self.in_fd, 0) & READ:
            self._queue_update()

    def close(self) -> None:
        super().close()
        self._drain()
        self.detach_fds()

    def room(self) -> int:
        """How many bytes may be read now."""
        return self.can_receive()

    def read_some(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end.  Raises BlockingIOError or another OSError."""
        return os.read(self.in_fd, size)

    @property
    def takes_another(self) -> bool:
        """Whether a peer may come in the place of this one, see `expect_another`."""
        return False

    def unread(self) -> bool:
        """Whether a peer that hung up has left bytes to read."""
        return True

    def hang_up(self) -> None:
        """The peer has gone; by default for good."""
        self.detach_fds()

    def _send(self, data: bytes | memoryview) -> int:
        """How many bytes went out.  A peer that has gone swallows all of them."""
        if self._reads_nothing:
            return len(data)
        view = memoryview(data)
        sent = 0
        try:
            while sent < len(view):
                sent += self._write(self.out_fd, view[sent:])
        except BlockingIOError:
            return sent
        except OSError as error:
            # The reading side finds out that the peer has gone.
            return sent if error.errno in NO_MEMORY else len(view)
        return sent

    def _drain(self) -> None:
        with self._lock:
            if self._pending and self.out_fd >= 0:
                with memoryview(self._pending) as view:
                    sent = self._send(view)
                del self._pending[:sent]

    def _tell_writable(self) -> None:
        told, self._tells_writable = self._tells_writable, False
        if told:
            self.writable()

    def _queue_update(self) -> None:
        if not self._update_queued:
            self._update_queued = True
            self.loop.call_soon(self._update)

    def _update(self) -> None:
        """Watches for what is wanted now: input if there is room, and output that waits."""
        self._update_queued = False
        room = self.room() if self.in_fd >= 0 and not self._ended else 0
        with self._lock:
            wanted: dict[int, int] = {}
            if self.in_fd >= 0 and (room > 0 or not self._hung_up):
                wanted[self.in_fd] = READ if room > 0 else HANGUP
            if self.out_fd >= 0 and (self._pending or self._tells_writable):
                wanted[self.out_fd] = wanted.get(self.out_fd, 0) | WRITE
            for fd in [fd for fd in self._watched if fd not in wanted]:
                self.loop.unwatch(fd)
                del self._watched[fd]
            for fd, events in wanted.items():
                if self._watched.get(fd) != events:
                    self._watch(fd, events)
        # A vCPU that has made room meanwhile saw in accept_input what was watched before.
        if room <= 0 <= self.in_fd and not self._ended and self.room() > 0:
            self._queue_update()

    def _watch(self, fd: int, events: int) -> None:
        try:
            self.loop.watch(fd, events, lambda ready: self._on_ready(fd, ready))
            self._watched[fd] = events
        except PermissionError:
            if events & READ and not self._read_queued:
                self._read_queued = True
                self.loop.call_soon(lambda: self._on_always_ready(fd))
            if events & WRITE:
                self.loop.call_soon(lambda: self._on_ready(fd, WRITE))

    def _on_always_ready(self, fd: int) -> None:
        self._read_queued = False
        self._on_ready(fd, READ)

    def _on_ready(self, fd: int, ready: int) -> None:
        if fd == self.out_fd and ready & ~READ:
            self._drain()
            if not self._pending:
                self._tell_writable()
        if self._ended:
            if not self._pending or ready & GONE:
                self._ended = False
                self.hang_up()
        elif fd == self.in_fd and ready & ~WRITE and not self._read_round():
            self._on_hangup(ready)
        if fd in (self.in_fd, self.out_fd):
            self._update()

    def _on_hangup(self, ready: int) -> None:
        """The peer may have gone while the frontend has no room: what it sent is kept.

        One that only sends no more may read on, for as long as nobody takes its place.
        """
        gone = GONE if self.takes_another else HANGUP | GONE
        if ready & gone and not self.unread():
            self.hang_up()
        elif ready & (HANGUP | GONE):
            self._hung_up = True
            if ready & GONE and self.in_fd == self.out_fd:
                self._reads_nothing = True
                self._drain()
                self._tell_writable()
            self.expect_another()

    def _on_end(self) -> None:
        """The peer sends no more; it may read on."""
        if self._pending:
            self._ended = self._hung_up = True
            self.expect_another()
        else:
            self.hang_up()

    def _read_round(self) -> bool:
        """Gives the frontend what it has room for.  False: it has none."""
        fd = self.in_fd
        left = BYTES_PER_ROUND
        for _ in range(READS_PER_ROUND):
            if left <= 0:
                break
            with self.input_lock:
                room = self.room()
                if room <= 0:
                    return False
                try:
                    data = self.read_some(min(room, READ_SIZE))
                except BlockingIOError:
                    return True
                except OSError as error:
                    if error.errno in NO_MEMORY:
                        return True
                    self.hang_up()
                    return True
                if data:
                    self.receive(data)
            if not data:
                self._on_end()
                return True
            left -= len(data)
            if self.in_fd != fd:
                return True
        return True
