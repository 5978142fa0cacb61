"""The other end of a migration channel: a socket that the suite listens on or connects to."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from .match import Mismatch
from .process import DEADLINE


class Peer:
    """Listens, takes one connection in the background and writes what comes to `file`."""

    def __init__(self, listener: socket.socket, file: Path) -> None:
        self._listener = listener
        self._file = file
        self._error = ""
        listener.settimeout(DEADLINE)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            connection = self._listener.accept()[0]
            with connection, self._file.open("wb") as file:
                connection.settimeout(DEADLINE)
                while data := connection.recv(1 << 16):
                    file.write(data)
        except OSError as error:
            self._error = str(error)

    def wait(self) -> None:
        """Waits for the other end to close."""
        self._thread.join(DEADLINE)
        if self._error or self._thread.is_alive():
            raise Mismatch(f"the channel did not come to its end: {self._error}")

    def close(self) -> None:
        self._listener.close()


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
