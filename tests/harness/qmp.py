"""A QMP client that keeps every message in the order in which it came."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

from waiting import SLOW

TIMEOUT = 30.0 * SLOW


class Closed(ConnectionResetError):
    """The VMM has closed the connection."""


class QmpError(Exception):
    """A command that was answered with an error; `error` is its dict."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["desc"])
        self.error = error


class Qmp:
    """One connection, past capabilities negotiation.  `timeout` is for how long it may be silent.

    `events` are those that have come before a reply.  Raises OSError where nobody answers yet.
    """

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self.events: list[dict[str, Any]] = []
        self._timeout = timeout
        self._data = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
            self.greeting = self.read()
            self.negotiated = self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def send(
        self, name: str, arguments: Any = None, /, fds: tuple[int, ...] = (), **keywords: Any
    ) -> None:
        """Sends a command; underscores in the names of keyword arguments become dashes."""
        message = {"execute": name}
        if keywords:
            arguments = {key.replace("_", "-"): value for key, value in keywords.items()}
        if arguments is not None:
            message["arguments"] = arguments
        self.send_raw(json.dumps(message).encode() + b"\n", fds)

    def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from None

    def read(self) -> dict[str, Any]:
        """The next message.  Raises Closed at the end, and TimeoutError."""
        deadline = time.monotonic() + self._timeout
        while b"\n" not in self._data:
            if not self._is_readable(deadline):
                raise TimeoutError(f"no QMP message in {self._timeout:.0f} s")
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Closed("QMP connection closed")
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(
        self, name: str, arguments: Any = None, /, fds: tuple[int, ...] = (), **keywords: Any
    ) -> dict[str, Any]:
        """The reply to a command: a dict with "return" or "error"."""
        self.send(name, arguments, fds, **keywords)
        return self.read_reply()

    def read_reply(self) -> dict[str, Any]:
        """The next message that is no event."""
        while "event" in (message := self.read()):
            self.events.append(message)
        return message

    def command(self, name: str, arguments: Any = None, /, **keywords: Any) -> Any:
        """What a command returns.  Raises QmpError."""
        reply = self.execute(name, arguments, **keywords)
        if "error" in reply:
            raise QmpError(reply["error"])
        return reply["return"]

    def hmp(self, line: str) -> str:
        return str(self.command("human-monitor-command", command_line=line))

    def wait_event(self, name: str, seconds: float) -> None:
        """Keeps the events that come until this one, or for so long.  Raises Closed."""
        deadline = time.monotonic() + seconds
        while b"\n" in self._data or self._is_readable(deadline):
            message = self.read()
            self.events.append(message)
            if message.get("event") == name:
                return

    def _is_readable(self, deadline: float) -> bool:
        left = max(deadline - time.monotonic(), 0)
        return bool(select.select([self._socket], [], [], left)[0])

    def wait_closed(self) -> None:
        """Reads until the other end closes, keeping the events."""
        try:
            while True:
                message = self.read()
                if "event" in message:
                    self.events.append(message)
        except OSError:
            self.close()

    def close(self) -> None:
        self._socket.close()
