"""A QMP client that keeps every message in the order in which it came."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

from .process import DEADLINE


class Closed(Exception):
    """The VMM has closed the connection."""


def abbreviate(message: dict[str, Any]) -> str:
    """A message in the short form that rows use.

    A MIGRATION event is its status, MIGRATION_PASS "pass:N", SHUTDOWN "SHUTDOWN reason", another
    event its name; a reply is its JSON, an error "error: text".
    """
    if "error" in message:
        return f"error: {message['error']['desc']}"
    if "event" not in message:
        return json.dumps(message["return"])
    name, data = message["event"], message.get("data", {})
    if name == "MIGRATION":
        return str(data["status"])
    if name == "MIGRATION_PASS":
        return f"pass:{data['pass']}"
    if name == "SHUTDOWN":
        return f"SHUTDOWN {data['reason']}"
    return str(name)


class Qmp:
    """One connection, past capabilities negotiation.

    `events` are the events not yet asked for.  Raises OSError or Closed where nobody answers yet.
    """

    def __init__(self, path: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._data = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
            self.greeting = self.read()
            self.negotiated = self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def send(self, command: str, arguments: Any = None, fds: tuple[int, ...] = ()) -> None:
        message = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        self.send_raw(json.dumps(message).encode(), fds)

    def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from None

    def read(self, seconds: float = DEADLINE) -> dict[str, Any]:
        """The next message.  Raises Closed at the end and TimeoutError."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._data:
            left = deadline - time.monotonic()
            if not select.select([self._socket], [], [], max(left, 0))[0]:
                raise TimeoutError(f"no QMP message in {seconds} s")
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Closed("EOF")
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(
        self, command: str, arguments: Any = None, fds: tuple[int, ...] = ()
    ) -> dict[str, Any]:
        """The reply to a command: a dict with "return" or "error"."""
        self.send(command, arguments, fds)
        while "event" in (message := self.read()):
            self.events.append(message)
        return message

    def close(self) -> None:
        self._socket.close()
