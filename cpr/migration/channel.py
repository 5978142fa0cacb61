"""Migration channels: bytes out to an address, or bytes in from one."""

from __future__ import annotations

import errno
import os
import stat

from cpr.errors import MigrationError
from cpr.migration.address import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Handed(Protocol):
        """Descriptors that monitors were handed; what they give becomes the caller's."""

        def take(self, name: str) -> int: ...
        def duplicate(self, set_id: int, writable: bool) -> int: ...


BUFFER_SIZE = 1 << 20
FD_SET = "/dev/fdset/"


class Channel:
    """A byte stream over one descriptor, which it owns.  Not for several threads at once."""

    def __init__(self, fd: int, kind: str, process: Any = None) -> None:
        """`kind` is "file", "socket" or "command", for errors; `process` is its exec: command."""
        self.kind = kind
        self._fd = fd
        self._process = process
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._ahead = b""
        self.transferred = 0

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
            data = data[os.write(self._fd, data) :]

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end."""
        if not self._ahead:
            self._ahead = os.read(self._fd, max(size, BUFFER_SIZE))
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    @property
    def fd(self) -> int:
        """The descriptor, which stays the channel's; for page contents at given offsets."""
        return self._fd

    def tell(self) -> int:
        """The offset in the file at which the next write goes on."""
        self.flush()
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def seek(self, offset: int) -> None:
        """Goes on at `offset` of the file."""
        self.flush()
        self._ahead = b""
        os.lseek(self._fd, offset, os.SEEK_SET)

    def finish(self) -> None:
        """Flushes and closes.  Raises OSError, also if an exec: command has failed."""
        self.flush()
        self._close_fd()
        if self._process is not None and self._process.wait() != 0:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))

    def close(self) -> None:
        """Closes without flushing; may be called twice."""
        self._pending = []
        self._close_fd()
        if self._process is not None:
            self._process.wait()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Listener:
    """A socket on which a source will connect.  Owns it until `accept` or `close`."""

    def __init__(self, address: dict) -> None:
        """Raises MigrationError with QEMU's text."""
        import socket

        try:
            if address["type"] == "unix":
                if os.path.exists(address["path"]):
                    os.unlink(address["path"])
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.bind(address["path"])
                self._socket.listen(1)
            else:
                self._socket = socket.create_server((address["host"], int(address["port"])))
        except (OSError, ValueError) as error:
            raise MigrationError(
                f"Failed to bind socket to {describe(address)}: {_strerror(error)}"
            ) from None

    def accept(self) -> Channel:
        """Waits for the source; the channel is the caller's."""
        with self._socket:
            return Channel(self._socket.accept()[0].detach(), "socket")


def open_outgoing(address: dict, handed: Handed) -> Channel:
    """Opens the channel for writing; the caller owns it.

    Raises MigrationError with QEMU's text; then nothing stays open.
    """
    if address["transport"] == "file":
        return _create_file(address, handed)
    if address["transport"] == "exec":
        return _spawn(address["args"], writing=True)
    if address["type"] == "fd":
        return _take(address, handed)
    return Channel(_connect(address), "socket")


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


def _open(path: str, flags: int, handed: Handed) -> int:
    """os.open, but /dev/fdset/N is a duplicate of a descriptor of that set."""
    number = path.removeprefix(FD_SET)
    if number != path and number.isdecimal():
        return handed.duplicate(int(number), bool(flags & os.O_WRONLY))
    return os.open(path, flags | os.O_CLOEXEC, 0o660)


def _create_file(address: dict, handed: Handed) -> Channel:
    path, offset = address["filename"], address.get("offset", 0)
    try:
        fd = _open(path, os.O_WRONLY | os.O_CREAT, handed)
    except OSError as error:
        raise MigrationError(f"Could not create '{path}': {error.strerror}") from None
    try:
        os.ftruncate(fd, offset)
    except OSError as error:
        os.close(fd)
        raise MigrationError(
            f"failed to truncate migration file to offset {offset:x}: {error.strerror}"
        ) from None
    os.lseek(fd, offset, os.SEEK_SET)
    return Channel(fd, "file")


def _open_file(address: dict, handed: Handed) -> Channel:
    path = address["filename"]
    try:
        fd = _open(path, os.O_RDONLY, handed)
    except OSError as error:
        raise MigrationError(f"Could not open '{path}': {error.strerror}") from None
    os.lseek(fd, address.get("offset", 0), os.SEEK_SET)
    return Channel(fd, "file")


def _spawn(args: list[str], writing: bool) -> Channel:
    import subprocess

    pipe: dict[str, Any] = {"stdin" if writing else "stdout": subprocess.PIPE}
    try:
        process = subprocess.Popen(args, **pipe)
    except OSError as error:
        raise MigrationError(f"Could not run '{args[0]}': {error.strerror}") from None
    stream = process.stdin if writing else process.stdout
    assert stream is not None
    fd = os.dup(stream.fileno())
    stream.close()
    return Channel(fd, "command", process)


def _connect(address: dict) -> int:
    import socket

    sock = None
    try:
        if address["type"] == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(address["path"])
        else:
            sock = socket.create_connection((address["host"], int(address["port"])))
    except (OSError, ValueError) as error:
        if sock is not None:
            sock.close()
        raise MigrationError(
            f"Failed to connect to '{describe(address)}': {_strerror(error)}"
        ) from None
    return sock.detach()


def _strerror(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
