"""A guest's console on a unix socket, with a shell at the other end that is told what to do."""

from __future__ import annotations

import socket
import time

from waiting import SLOW

ANSWER_SECONDS = 40.0 * SLOW


class Console:
    """Connects in `__init__`, as often as it takes until the VMM listens at `path`."""

    def __init__(self, path: str) -> None:
        """Raises OSError where nobody listens for ANSWER_SECONDS."""
        self._path = path
        self._commands = 0
        self._unread = ""
        self._socket: socket.socket | None = None
        self.connect()

    def connect(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(ANSWER_SECONDS)
            try:
                self._socket.connect(self._path)
                return
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def read_until(self, text: str, seconds: float = ANSWER_SECONDS) -> str:
        """What the guest writes on its console up to `text`.  Raises RuntimeError without it."""
        assert self._socket is not None
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RuntimeError(f"no {text!r} on the console: {self._unread[-2000:]!r}")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise RuntimeError(f"the console was closed: {self._unread[-2000:]!r}")
            self._unread += data.decode(errors="replace").replace("\r", "")
        read, _, self._unread = self._unread.partition(text)
        return read

    def type(self, line: str) -> None:
        assert self._socket is not None
        self._socket.sendall(f"{line}\n".encode())

    def ask(self, command: str, seconds: float = ANSWER_SECONDS) -> str:
        """What the shell answers to a command line."""
        self._commands += 1
        number = self._commands
        self.type(f"echo be''gin-{number}; {command}; echo e''nd-{number}")
        self.read_until(f"begin-{number}\n", seconds)
        return self.read_until(f"end-{number}\n", seconds).strip()
