"""The other end of a migration channel: a socket or a pipe that the suite reads."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path

from .match import Mismatch
from .process import DEADLINE


class Receiver:
    """Copies what comes from `source()` to `file`, in the background."""

    def __init__(self, source: Callable[[], BufferedIOBase], file: Path) -> None:
        self._source = source
        self._file = file
        self._error = ""
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            with self._source() as source, self._file.open("wb") as file:
                shutil.copyfileobj(source, file)
        except OSError as error:
            self._error = str(error)

    def wait(self) -> None:
        """Waits for the other end to close."""
        self._thread.join(DEADLINE)
        if self._error or self._thread.is_alive():
            raise Mismatch(f"the channel did not come to its end: {self._error}")


def accept(listener: socket.socket) -> BufferedIOBase:
    """The one connection that `listener` is for."""
    with listener:
        listener.settimeout(DEADLINE)
        connection = listener.accept()[0]
        connection.settimeout(DEADLINE)
        with connection:
            return connection.makefile("rb")


def listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def listen_tcp() -> tuple[socket.socket, str]:
    """A listener on a free port of 127.0.0.1, and that port."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, str(listener.getsockname()[1])


def free_port() -> str:
    """A port that nobody listens on."""
    listener, port = listen_tcp()
    listener.close()
    return port
