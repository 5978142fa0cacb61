"""The other end of a migration channel: a socket or a pipe that the suite reads."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

from .match import Mismatch
from .process import DEADLINE

ACCEPTING = 0x10000
"""The flag of a listening socket in /proc/net/unix."""

Open = Callable[[], BinaryIO]


class Pump:
    """Copies all that comes from `source()` to `sink()`, in the background, and closes both."""

    def __init__(self, source: Open, sink: Open) -> None:
        self._source = source
        self._sink = sink
        self._error = ""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        try:
            with self._source() as source, self._sink() as sink:
                shutil.copyfileobj(source, sink)
        except OSError as error:
            self._error = str(error)

    def wait(self) -> None:
        """Waits for the other end to close."""
        self._thread.join(DEADLINE)
        if self._error or self._thread.is_alive():
            raise Mismatch(f"the channel did not come to its end: {self._error}")


def fd_file(fd: int, mode: Literal["rb", "wb"]) -> Open:
    """A descriptor as a file, which closes it."""
    return lambda: open(fd, mode)


def from_file(path: Path) -> Open:
    return lambda: path.open("rb")


def to_file(path: Path) -> Open:
    return lambda: path.open("wb")


def connection_to(listener: socket.socket) -> Open:
    """The one connection that `listener` is for."""

    def accept() -> BinaryIO:
        with listener:
            listener.settimeout(DEADLINE)
            connection = listener.accept()[0]
        connection.settimeout(DEADLINE)
        with connection:
            return connection.makefile("rb")

    return accept


def listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def is_listening(path: str) -> bool:
    """Whether a socket that was bound to this name takes connections by now."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        words = line.split()
        if words[-1] == path and int(words[3], 16) & ACCEPTING:
            return True
    return False


def listen_tcp() -> tuple[socket.socket, str]:
    """A listener on a free port of 127.0.0.1, and that port."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, str(listener.getsockname()[1])


def free_port() -> str:
    """A port that nobody listens on."""
    listener, port = listen_tcp()
    listener.close()
    return port
