"""Migration channels: bytes out to an address, or bytes in from one.

No peer can hold a thread here for ever: descriptors are non-blocking, every wait is also one for
`Channel.shutdown`, which any thread may call, and what the system calls raise is translated at
this edge.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from _thread import allocate_lock, start_new_thread
from contextlib import suppress

from cpr.errors import MigrationError
from cpr.migration.cancellation import Cancellation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from cpr.migration.child import Child
    from cpr.process_group import ReapLater

    class Handed(Protocol):
        """Descriptors that monitors were handed; what `take` gives becomes the caller's."""

        def take(self, name: str) -> int: ...
        def find(self, set_id: int, writable: bool) -> int: ...


BUFFER_SIZE = 1 << 20
"""Bytes of one read, and of what is written before it goes out."""

FD_SET = "/dev/fdset/"
MOST_DIGITS = 19  # of the number of a set


def _reap_on_thread(pid: int, reap: Callable[[], None]) -> None:
    try:
        start_new_thread(reap, ())
    except RuntimeError:
        pass  # there is no thread for it: it stays a zombie until this process ends


reap_later: ReapLater = _reap_on_thread
"""For an exec: command that is left.  In a VMM the main loop waits for it: with a thread that does,
no update could be made."""


class Channel:
    """A byte stream over one descriptor, which it owns.  Not for several threads at once, but for
    `shutdown`.  `waits`: its other end may keep a reader or a writer waiting."""

    def __init__(
        self, fd: int, kind: str, child: Child | None = None, start: int | None = None
    ) -> None:
        """`kind` is "file", "socket" or "command", for errors; `child` is its exec: command.

        `start` is the offset from which on a file is this channel's, to be written to.
        Raises MigrationError where there is no descriptor left; then `fd` is closed.
        """
        self.kind = kind
        self._fd = fd
        self._child = child
        self._start = start
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._ahead = b""
        self.transferred = 0
        self.put_out = 0  # of what is transferred, in bytes
        self._made_nonblocking = False
        self._closing = allocate_lock()  # a number that was closed may be another file's
        try:
            mode = os.fstat(fd).st_mode
            self._is_socket = stat.S_ISSOCK(mode)
            self.waits = not stat.S_ISREG(mode)
            self._has_begun = not stat.S_ISFIFO(mode)
            if self.waits and os.get_blocking(fd):
                os.set_blocking(fd, False)
                self._made_nonblocking = True
            self._cancellation = Cancellation()
        except OSError as error:
            os.close(fd)
            raise MigrationError(f"Could not use the {kind}: {_strerror(error)}") from None

    def shutdown(self) -> None:
        """Ends what another thread does with this channel, and refuses all that comes later.

        Writes raise OSError ECANCELED, reads MigrationError; an exec: command is killed.  May be
        called from any thread and again, also after `close`.
        """
        self._cancellation.cancel()
        with self._closing:
            if self._is_socket and self._fd >= 0:
                import socket

                try:
                    with socket.socket(fileno=os.dup(self._fd)) as twin:
                        twin.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is not connected any more
        if self._child is not None:
            self._child.kill()

    def call_on_shutdown(self, callback: Callable[[], None]) -> None:
        """`shutdown` calls `callback` too, for a writer that uses `fd` itself; the last one set."""
        self._cancellation.callback = callback
        if self._cancellation.cancelled:
            callback()

    def write(self, data: bytes) -> None:
        """Buffers `data`; raises OSError when the other end has gone."""
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size >= BUFFER_SIZE:
            self.flush()

    def flush(self) -> None:
        """Puts out what is buffered; raises OSError when the other end has gone."""
        data = memoryview(b"".join(self._pending))
        self._pending = []
        self._pending_size = 0
        self.transferred += len(data)
        while data:
            self._cancellation.check()
            try:
                done = os.write(self._fd, data)
            except BlockingIOError:
                self._cancellation.wait(self._fd, select.POLLOUT)
            else:
                self.put_out += done
                data = data[done:]

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end.  Raises MigrationError."""
        if not self._ahead:
            try:
                self._ahead = self._read_some()
            except OSError as error:
                raise MigrationError(
                    f"Unable to read from {self.kind}: {_strerror(error)}"
                ) from None
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def _read_some(self) -> bytes:
        while True:
            self._cancellation.check()
            if not self._has_begun:  # a FIFO that nobody has opened to write reads as ended
                self._cancellation.wait(self._fd, select.POLLIN)
                self._has_begun = True
            try:
                return os.read(self._fd, BUFFER_SIZE)
            except BlockingIOError:
                self._cancellation.wait(self._fd, select.POLLIN)

    @property
    def fd(self) -> int:
        """The descriptor, which stays the channel's; for page contents at given offsets."""
        return self._fd

    def tell(self) -> int:
        """The offset in the file at which the next write goes on.  Raises OSError."""
        self.flush()
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def discard(self) -> None:
        """Gives back the room of a file whose writing has failed; the guest may need it."""
        if self._start is not None and self._fd >= 0:
            with suppress(OSError):
                os.ftruncate(self._fd, self._start)

    def seek(self, offset: int) -> None:
        """Goes on at `offset` of the file.  Raises OSError."""
        self.flush()
        self._ahead = b""
        os.lseek(self._fd, offset, os.SEEK_SET)

    def finish(self) -> None:
        """Flushes and closes.  Raises OSError, also if an exec: command has failed."""
        self.flush()
        self._close_fd()
        if self._child is not None and self._child.wait(self._cancellation) != 0:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        self.close()

    def close(self) -> None:
        """Closes without flushing and without waiting for anybody; may be called twice.

        Nobody is told what becomes of what was written; `finish` tells.
        """
        self._pending = []
        try:
            self._close_fd()
        except OSError:  # a quota of a network's file system
            pass
        self._cancellation.close()
        if self._child is not None:
            self._child.leave()
            self._child = None

    def _close_fd(self) -> None:
        with self._closing:  # not for the close itself: a network's file system may hold that up
            fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._made_nonblocking:  # whoever handed it over may still use it
                os.set_blocking(fd, True)
            os.close(fd)


class MemoryChannel:
    """What is written to it, or `data` to read from it, without a descriptor."""

    def __init__(self, data: bytes = b"") -> None:
        self._data = data
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._pieces.append(data)

    def written(self) -> bytes:
        return b"".join(self._pieces)

    def read(self, size: int) -> bytes:
        data, self._data = self._data[:size], self._data[size:]
        return data

    def close(self) -> None:
        pass


def open_outgoing(address: dict, handed: Handed, cancellation: Cancellation) -> Channel:
    """Opens the channel for writing; the caller owns it.  `cancellation` ends a wait for the peer.

    Raises MigrationError with QEMU's text; then nothing stays open.
    """
    if address["transport"] == "file":
        return _create_file(address, handed)
    if address["transport"] == "exec":
        return _spawn(address["args"], writing=True)
    if address["type"] == "fd":
        return _take(address, handed)
    from cpr.migration.connect import connect

    return Channel(connect(address, cancellation), "socket")


def open_incoming(address: dict, handed: Handed) -> Channel:
    """Opens the channel for reading; the caller owns it.  Not for sockets: see Listener.

    Raises MigrationError with QEMU's text; then nothing stays open.
    """
    if address["transport"] == "file":
        return _open_file(address, handed)
    if address["transport"] == "exec":
        return _spawn(address["args"], writing=False)
    return _take(address, handed)


def _take(address: dict, handed: Handed) -> Channel:
    fd = handed.take(address["str"])
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise MigrationError("fd: migration to a file is not supported. Use file: instead.")
    return Channel(fd, "socket" if stat.S_ISSOCK(os.fstat(fd).st_mode) else "file")


def locate(path: str, writable: bool, handed: Handed) -> str | int:
    """What is at `path`: of /dev/fdset/N the descriptor of that set, which stays the set's.

    Raises OSError as opening it does.
    """
    number = path.removeprefix(FD_SET)
    if number != path and number.isdecimal() and len(number) <= MOST_DIGITS:
        return handed.find(int(number), writable)
    return path


def _open(path: str, flags: int, handed: Handed) -> int:
    where = locate(path, bool(flags & os.O_WRONLY), handed)
    if isinstance(where, int):
        return os.dup(where)
    return os.open(where, flags | os.O_CLOEXEC, 0o660)


def _create_file(address: dict, handed: Handed) -> Channel:
    path, offset = address["filename"], address.get("offset", 0)
    is_new = not os.path.lexists(path)
    try:
        # O_NONBLOCK: a FIFO that nobody reads must not hold the monitor.
        fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, handed)
    except OSError as error:
        raise MigrationError(f"Could not create '{path}': {error.strerror}") from None
    try:
        os.ftruncate(fd, offset)
        os.lseek(fd, offset, os.SEEK_SET)
    except OSError as error:
        os.close(fd)
        if is_new:
            with suppress(OSError):
                os.unlink(path)
        raise MigrationError(
            f"failed to truncate migration file to offset {offset:x}: {error.strerror}"
        ) from None
    return Channel(fd, "file", start=offset)


def _open_file(address: dict, handed: Handed) -> Channel:
    path, offset = address["filename"], address.get("offset", 0)
    try:
        fd = _open(path, os.O_RDONLY | os.O_NONBLOCK, handed)
    except OSError as error:
        raise MigrationError(f"Could not open '{path}': {error.strerror}") from None
    try:
        os.lseek(fd, offset, os.SEEK_SET)
    except OSError as error:
        if offset or error.errno != errno.ESPIPE:
            os.close(fd)
            raise MigrationError(
                f"Could not go to offset {offset:#x} of '{path}': {error.strerror}"
            ) from None
    return Channel(fd, "file")


def _spawn(args: list[str], writing: bool) -> Channel:
    from cpr.migration.child import Child

    child = Child(args, writing, reap_later)
    try:
        return Channel(child.fd, "command", child)
    except MigrationError:
        child.kill()
        child.leave()
        raise


def _strerror(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
