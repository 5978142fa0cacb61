"""The new image's side of an update: who was there before, and how it takes over.

See `transaction`.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import os
import time

from cpr.constants import NS_PER_S, STDERR
from cpr.live import oom
from cpr.live import token as tokens
from cpr.live.transaction import (
    BACK,
    EARLY,
    END,
    ENDING,
    EXEC_PID,
    HELLO,
    LEFT_OPEN,
    PROTOCOL,
    REFUSE,
    VARIABLE,
    VERSIONS,
    UpdateError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from types import ModuleType
    from typing import Any

    from cpr.live.messages import Message


class Predecessor:
    """The new image's side: the old image from before this exec.

    `mode` is EARLY, LATE or REHEARSE; `page` tells when things began.  Owns the token, the page
    and the socket until `commit` or `close`.
    """

    def __init__(self, token: int, page: Any, sock: int, mode: str) -> None:
        self.mode = mode
        self.page = page
        self._token = token
        self._socket_fd = sock
        self._socket_object: socket.socket | None = None
        self._pid = os.getpid()
        self.committed = False

    @property
    def _socket(self) -> socket.socket:
        if self._socket_object is None:  # a late image that gets on needs none
            import socket

            self._socket_object = socket.socket(fileno=self._socket_fd)
        return self._socket_object

    def hello(self, program: str) -> None:
        """Asks for the state; `program` names this one, with its version."""
        self.send(HELLO, {"protocol": PROTOCOL, "versions": VERSIONS, "program": program})

    def send(self, kind: str, body: dict[str, Any] | None = None) -> None:
        """Raises UpdateError where the old image is not there any more."""
        from cpr.live import messages

        check_process(self._pid)
        try:
            messages.send(self._socket, kind, body or {}, [])
        except messages.Ended as error:
            raise UpdateError(f"the old program has ended: {error}") from None

    def receive(self, expected: str) -> Message:
        """Waits for a message of this kind; its descriptors are the caller's.

        Ends this process, with the status that it is told, where the old image has ended on
        purpose.  Raises UpdateError where that is not there any more.
        """
        from cpr.live import messages

        check_process(self._pid)
        try:
            message = messages.receive(self._socket)
        except messages.InPart as error:
            raise UpdateError(str(error)) from None
        except messages.Ended as error:
            raise UpdateError(f"the old program has ended: {error}") from None
        if message.kind == END:
            message.close()
            raise SystemExit(int(message.body.get("status", 0)))
        if message.kind != expected:
            message.close()
            raise UpdateError(f"the old program sent '{message.kind}' in place of '{expected}'")
        if numbers := message.body.pop(LEFT_OPEN, None):
            _take_open(numbers)
            message.fds += numbers
        return message

    def hold(self, on: bool) -> None:
        """While it is on the deadline does not run: somebody is waited for."""
        self.page.struct.hold = int(on)

    def end(self) -> None:
        """Says that what is updated ends with this process, which has not committed."""
        self.page.struct.ended = 1

    def commit(self) -> None:
        """Takes the token: all that was handed over is this image's from now on.

        Raises UpdateError where the old image has taken it first; this one then has nothing.
        """
        check_process(self._pid)
        if not tokens.take_token(self._token):
            raise UpdateError("the old program has taken back over: this one came too late")
        self.committed = True

    def wait_hang_up(self, timeout_ns: int) -> Message | None:
        """Waits until the old image has closed all that it had, but no longer than this.

        What it has said as its last, whose descriptors are the caller's, or None.  Raises
        UpdateError where that has come in part only: there is no room for its descriptors.
        """
        from cpr.live import messages

        deadline = time.monotonic_ns() + timeout_ns
        last: Message | None = None
        try:
            while (left := deadline - time.monotonic_ns()) > 0:
                self._socket.settimeout(left / NS_PER_S)
                message = messages.receive(self._socket)
                if last is not None:
                    last.close()
                last = message
        except messages.InPart as error:
            raise UpdateError(str(error)) from None
        except messages.Ended:
            pass
        return last

    def refuse(self, reason: str) -> None:
        """Tells the old image why this one cannot take over, and does what it is told.

        It executes the old command; comes back only where this process is to end.
        """
        if self.committed:
            return
        try:
            self.send(REFUSE, {"reason": reason})
            message = self.receive(BACK)
        except UpdateError:
            return
        fds = (self._token, self.page.fd, self._socket_fd)
        words, folder = message.body["argv"], message.body["cwd"]
        variables = dict(message.body["environment"])
        variables[VARIABLE] = f"{','.join(map(str, fds))},{EARLY}"
        if EXEC_PID in os.environ:  # of this PID, whoever was the manager's child before
            variables[EXEC_PID] = os.environ[EXEC_PID]
        try:
            names = os.listdir("/proc/self/fd")  # a late exec gives many
        except OSError:
            return
        for fd in map(int, names):
            try:
                os.set_inheritable(fd, fd in fds or fd <= STDERR)
            except OSError:
                pass  # that of the listing itself
        signal.pthread_sigmask(signal.SIG_SETMASK, message.body.get("blocked", ENDING))
        try:
            os.chdir(folder)
            os.execve(words[0], words, variables)
        except OSError:
            return  # this process ends, which the old image sees

    def close(self) -> None:
        """Gives up what the update needed; the guard ends meanwhile, and is this one's to reap."""
        if self.committed:
            oom.withdraw("self", self.page.score_before)
        if self._socket_object is not None:
            self._socket_object.close()
        else:
            os.close(self._socket_fd)
        os.close(self._token)
        self.page.close()


def check_process(pid: int) -> None:
    """Raises UpdateError in another process than the one that was started, such as its child."""
    if os.getpid() != pid:
        raise UpdateError(
            f"only the new program's own process, PID {pid}, takes over; this is another one"
        )


def _take_open(numbers: list[int]) -> None:
    """Descriptors that have come over the exec as they were.  Raises UpdateError."""
    for number in numbers:
        try:
            os.set_inheritable(number, False)
        except OSError as error:
            text = f"descriptor {number} did not come over the exec: {error.strerror}"
            raise UpdateError(text) from None


def find_predecessor(backend: ModuleType | None = None) -> Predecessor | None:
    """The old image that this process's environment names, if any; the variable is unset.

    `backend` as for Update: it is what reads the page, whoever has made the guard.
    Raises UpdateError for a variable that is none of ours, or descriptors that are not there.
    """
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    try:
        token, page, sock, mode = text.split(",")
        numbers = [int(word) for word in (token, page, sock)]
        for number in numbers:
            os.set_inheritable(number, False)
        page_of = (backend or _guard()).Page
        return Predecessor(numbers[0], page_of(numbers[1]), numbers[2], mode)
    except (ValueError, OSError) as error:
        raise UpdateError(
            f"{VARIABLE}='{text}' names no update: {error}; unset it to start afresh"
        ) from None


def _guard() -> ModuleType:
    from cpr.live import guard

    return guard
