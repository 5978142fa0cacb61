"""What the old image says and hears: messages in their order (see `transaction`)."""

from __future__ import annotations

import fcntl
import os

from cpr.constants import STDERR
from cpr.live.transaction import (
    AFTER,
    CLOSED,
    GOING,
    HAND_OVER,
    LEFT_OPEN,
    STARTING,
    TRANSITIONS,
    UpdateError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any

    from cpr.live.messages import Message

QUEUE_TIMEOUT = 1.0  # s


class Channel:
    """The old image's end of the socket pair; `state` is a row of TRANSITIONS.

    Owns both ends, and copies of descriptors that were left open, until `close_channel`.
    """

    def __init__(self) -> None:
        self.state = STARTING
        self._socket: socket.socket | None = None
        self._theirs: socket.socket | None = None
        self._left_open: list[int] = []
        self._copies: list[int] = []

    def open_channel(self) -> None:
        """Raises OSError."""
        from cpr.live import messages

        self._socket, self._theirs = messages.pair()

    def fileno(self) -> int:
        """Readable when the new image has said something, or its end is closed."""
        return self._socket.fileno() if self._socket is not None else -1

    def give_theirs(self) -> None:
        """The new image has its end now."""
        assert self._theirs is not None
        self._theirs.close()
        self._theirs = None

    def _set(self, state: str) -> None:
        if state not in TRANSITIONS[self.state]:
            raise UpdateError(f"an update that is {self.state} cannot be {state}")
        self.state = state

    def receive(self) -> Message:
        """What the new image says; its descriptors are the caller's.

        Raises UpdateError where it has hung up, or says what has no place now.
        """
        from cpr.live import messages

        assert self._socket is not None
        try:
            message = messages.receive(self._socket, in_one=True)
        except messages.Ended as error:
            raise UpdateError(str(error)) from None
        if message.kind not in AFTER:
            message.close()
            raise UpdateError(f"the new program sent '{message.kind}', which is unknown")
        try:
            self._set(AFTER[message.kind])
        except UpdateError:
            message.close()
            raise
        return message

    def has_message(self) -> bool:
        """Whether `receive` would return at once; false also where the new image has hung up."""
        import socket

        assert self._socket is not None
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def send(
        self,
        kind: str,
        body: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        data: bytes = b"",
    ) -> None:
        """Sends one message; `fds` stay the caller's.  Raises UpdateError."""
        from cpr.live import messages

        assert self._socket is not None
        try:
            messages.send(self._socket, kind, body or {}, list(fds), data)
        except messages.Ended as error:
            raise UpdateError(str(error)) from None
        if kind == HAND_OVER:
            self._set(GOING)

    def queue(self, kind: str, body: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Sends what the new image finds when it is there; `fds` stay the caller's.

        Raises UpdateError where the socket does not take it: there are too many descriptors.
        """
        from cpr.live import messages

        assert self._socket is not None
        self._socket.settimeout(QUEUE_TIMEOUT)
        try:
            messages.send(self._socket, kind, body, list(fds))
        except messages.Ended as error:
            text = f"{len(fds)} descriptors cannot be queued for the new program: {error}"
            raise UpdateError(text) from None
        finally:
            self._socket.settimeout(None)

    def leave_open(self, kind: str, body: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """As queue, of any number: the descriptors stay open over a late exec.

        They stay the caller's, and must be open until `execute`.  Raises UpdateError.
        """
        numbers: list[int] = []
        try:
            for fd in fds:
                if fd <= STDERR or fd in numbers:  # each is one of its own in the new image
                    fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STDERR + 1)
                    self._copies.append(fd)
                numbers.append(fd)
            self._left_open += [fd for fd in numbers if not os.get_inheritable(fd)]
        except OSError as error:
            raise UpdateError(f"descriptors of the update: {error.strerror}") from None
        self.queue(kind, {**body, LEFT_OPEN: numbers})

    def close_channel(self) -> None:
        """May be called twice."""
        for sock in (self._socket, self._theirs):
            if sock is not None:
                sock.close()
        self._socket = self._theirs = None
        for fd in self._copies:
            os.close(fd)
        self._copies = []
        self.state = CLOSED
