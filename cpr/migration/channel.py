"""Migration channels: from a URI or a `channels` argument to bytes out or bytes in.

    file:PATH[,offset=N]    exec:COMMAND    fd:NAME    unix:PATH    tcp:HOST:PORT

An address is QEMU's MigrationAddress as a dict: {"transport": "file", "filename", "offset"},
{"transport": "exec", "args"}, {"transport": "socket", "type": "unix", "path"}, {"transport":
"socket", "type": "inet", "host", "port"}, {"transport": "socket", "type": "fd", "str"}.
"""

from __future__ import annotations

import os

from cpr.errors import MigrationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    FindFd = Callable[[str], int]

SIZE_SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
BACKGROUND = frozenset({"unix", "inet"})
BUFFER_SIZE = 1 << 20


def parse(uri: str | None, channels: list[dict] | None) -> dict:
    """The main channel's address.  Raises MigrationError with QEMU's text."""
    if bool(uri is not None) == bool(channels):
        raise MigrationError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return parse_uri(uri)
    assert channels is not None
    main = [c for c in channels if c.get("channel-type") == "main"]
    if len(main) > 1:
        raise MigrationError("Channel list has more than one main entry")
    if not main:
        raise MigrationError("Channel list has no main entry: add one of channel-type 'main'")
    return check(main[0]["addr"])


def cpr_address(channels: list[dict] | None) -> dict | None:
    """The address of the cpr channel, or None where there is none."""
    for each in channels or ():
        if each.get("channel-type") == "cpr":
            return check(each["addr"])
    return None


REQUIRED_KEYS = {
    "file": ("filename",),
    "exec": ("args",),
    "unix": ("path",),
    "inet": ("host", "port"),
    "fd": ("str",),
}


def check(address: dict) -> dict:
    """The address of a `channels` argument or of -incoming, with all the keys that it must have.

    Raises MigrationError with QEMU's text.
    """
    transport = address.get("transport")
    if transport is None:
        raise MigrationError("Parameter 'transport' is missing")
    kind = address.get("type") if transport == "socket" else transport
    if kind is None:
        raise MigrationError("Parameter 'type' is missing")
    if kind not in REQUIRED_KEYS or (transport == "socket" and kind in ("file", "exec")):
        name = "type" if transport == "socket" else "transport"
        raise MigrationError(f"Parameter '{name}' does not accept value '{kind}'")
    for key in REQUIRED_KEYS[kind]:
        if key not in address:
            raise MigrationError(f"Parameter '{key}' is missing")
    if kind == "file":
        return address | {"offset": int(address.get("offset", 0))}
    return address


def parse_uri(uri: str) -> dict:
    """The address that `uri` stands for.  Raises MigrationError with QEMU's text."""
    scheme, _, rest = uri.partition(":")
    if scheme == "file" and rest:
        return _parse_file(rest)
    if scheme == "exec" and rest:
        return {"transport": "exec", "args": ["/bin/sh", "-c", rest]}
    if scheme == "fd" and rest:
        return {"transport": "socket", "type": "fd", "str": rest}
    if scheme == "unix" and rest:
        return {"transport": "socket", "type": "unix", "path": rest}
    if scheme == "tcp" and ":" in rest:
        host, _, port = rest.rpartition(":")
        return {"transport": "socket", "type": "inet", "host": host.strip("[]"), "port": port}
    raise MigrationError(f"unknown migration protocol: {uri}")


def _parse_file(rest: str) -> dict:
    path, found, offset = rest.partition(",offset=")
    return {
        "transport": "file",
        "filename": path,
        "offset": _parse_offset(offset) if found else 0,
    }


def _parse_offset(text: str) -> int:
    digits, suffix = text, ""
    if text[:2].lower() != "0x" and text[-1:].lower() in SIZE_SUFFIXES:
        digits, suffix = text[:-1], text[-1].lower()
    try:
        return int(digits, 0) << SIZE_SUFFIXES.get(suffix, 0)
    except ValueError:
        raise MigrationError(f"file URI has bad offset {text}: Invalid argument") from None


def connects_in_background(address: dict) -> bool:
    """True where QEMU answers `migrate` before the channel is there."""
    return address.get("type") in BACKGROUND


def describe(address: dict) -> str:
    """The address for messages, as QEMU writes it there."""
    if address["transport"] == "file":
        return str(address["filename"])
    if address["transport"] == "exec":
        return " ".join(address["args"])
    return str(address.get("path") or address.get("str") or f"{address['host']}:{address['port']}")


class Channel:
    """A byte stream over one descriptor, which it owns.  Not for several threads at once."""

    def __init__(self, fd: int, process: Any = None) -> None:
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

    def finish(self) -> None:
        """Flushes and closes.  Raises MigrationError if an exec: command failed."""
        self.flush()
        self._close_fd()
        if self._process is not None and self._process.wait() != 0:
            raise MigrationError("the command of the exec: channel failed")

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


def open_outgoing(address: dict, find_fd: FindFd) -> Channel:
    """Opens the channel for writing; the caller owns it.

    `find_fd(name)` gives a descriptor that the monitor was handed, and its ownership.  Raises
    MigrationError with QEMU's text; then nothing stays open.
    """
    if address["transport"] == "file":
        return _create_file(address)
    if address["transport"] == "exec":
        return _spawn(address["args"], writing=True)
    if address["type"] == "fd":
        return Channel(find_fd(address["str"]))
    return Channel(_connect(address))


def _create_file(address: dict) -> Channel:
    path, offset = address["filename"], address.get("offset", 0)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o660)
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
    return Channel(fd)


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
    return Channel(fd, process)


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
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MigrationError(f"Failed to connect to '{describe(address)}': {text}") from None
    return sock.detach()


def open_incoming(
    address: dict, find_fd: FindFd, on_listening: Callable[[], None] = lambda: None
) -> Channel:
    """Opens the channel for reading, waiting for a peer on a socket; the caller owns it.

    `on_listening` is called where a peer could connect from now on.
    Raises MigrationError with QEMU's text; then nothing stays open.
    """
    if address["transport"] == "file":
        return _open_file(address)
    if address["transport"] == "exec":
        return _spawn(address["args"], writing=False)
    if address["type"] == "fd":
        return Channel(find_fd(address["str"]))
    return Channel(_accept(address, on_listening))


def _open_file(address: dict) -> Channel:
    path = address["filename"]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise MigrationError(f"Could not open '{path}': {error.strerror}") from None
    os.lseek(fd, address.get("offset", 0), os.SEEK_SET)
    return Channel(fd)


def _accept(address: dict, on_listening: Callable[[], None]) -> int:
    import socket

    try:
        if address["type"] == "unix":
            path = address["path"]
            if os.path.exists(path):
                os.unlink(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(path)
            listener.listen(1)
        else:
            listener = socket.create_server((address["host"], int(address["port"])))
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MigrationError(f"Failed to bind socket to {describe(address)}: {text}") from None
    with listener:
        on_listening()
        return listener.accept()[0].detach()
