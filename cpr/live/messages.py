"""What old and new image say to each other: JSON with descriptors beside it, over a socketpair.

A message is one packet (SOCK_SEQPACKET): a byte that says where its content is, in the packet or,
if it is long, in a memfd that is its first descriptor, then the content.  That is the JSON and, if
the message has bytes besides, a NUL and these.  Descriptors that do not fit into one packet go
before it, in packets of their own.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
from typing import Any

from cpr.constants import STDERR
from cpr.live import sealed
from cpr.live.token import above_streams

INLINE, MEMFD, MORE = b"i", b"m", b"+"
END_OF_TEXT = b"\0"  # which JSON never has
MOST_INLINE = 64 << 10  # bytes; far below what a socket buffer takes
MOST_CONTENT = 64 << 20  # bytes
MOST_FDS = 200  # of one packet; the kernel's limit is 253 (SCM_MAX_FD)
MOST_REASON = 2000  # characters
MOST_PACKETS = 6000  # of one message: 1200000 descriptors, more than a process has (fs.nr_open)


NO_MESSAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
"""What reading raises that is none."""


class Message:
    """`kind` and the other members of the JSON, and the bytes besides.

    `fds` are the receiver's, close-on-exec.
    """

    def __init__(self, kind: str, body: dict[str, Any], fds: list[int], data: bytes = b"") -> None:
        self.kind = kind
        self.body = body
        self.fds = fds
        self.data = data

    @property
    def reason(self) -> str:
        """Why the sender cannot take over: of what it says a line that can be printed."""
        text = str(self.body.get("reason", ""))[:MOST_REASON]
        return "".join(each if each.isprintable() else " " for each in text).strip()

    def close(self) -> None:
        """Closes the descriptors that nobody has taken out of `fds`."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Ended(Exception):
    """The other side has hung up, or has sent what is no message."""


class InPart(Ended):
    """A message that this process has no room for; the other side is there."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends, close-on-exec; the caller owns them.  Raises OSError."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return _above_streams(first), _above_streams(second)


def _above_streams(sock: socket.socket) -> socket.socket:
    return socket.socket(fileno=above_streams(sock.detach())) if sock.fileno() <= STDERR else sock


def send(
    sock: socket.socket, kind: str, body: dict[str, Any], fds: list[int], data: bytes = b""
) -> None:
    """Sends one message; `fds` stay the caller's.  Raises Ended where nobody takes it."""
    content = json.dumps({"kind": kind, **body}).encode()
    if data:
        content += END_OF_TEXT + data
    memfd = -1
    try:
        if len(content) > MOST_INLINE:
            memfd = sealed.create("cpr-message")
            with open(memfd, "wb", closefd=False) as file:
                file.write(content)
            sealed.seal(memfd)
            fds, mark, content = [memfd, *fds], MEMFD, b""
        else:
            mark = INLINE
        while len(fds) > MOST_FDS:
            socket.send_fds(sock, [MORE], fds[:MOST_FDS])
            fds = fds[MOST_FDS:]
        socket.send_fds(sock, [mark + content], fds)
    except OSError as error:
        raise Ended(f"the other side takes nothing: {error.strerror}") from None
    finally:
        if memfd >= 0:
            os.close(memfd)


def receive(sock: socket.socket, in_one: bool = False) -> Message:
    """Waits for the next message.  Raises Ended; then no descriptor stays open.

    With `in_one` it has one packet, and nobody is waited for who has said a part of it.
    """
    fds: list[int] = []
    try:
        for _ in range(MOST_PACKETS):
            packet, flags = _receive_packet(sock, fds)
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise InPart("a message of the other side came in part only: raise RLIMIT_NOFILE")
            if packet[:1] != MORE:
                return _decode(packet, fds)
            if in_one:
                raise Ended("a new program's message has one packet")
        raise Ended("the other side's message does not end")
    except (OSError, *NO_MESSAGE) as error:
        _close(fds)
        raise Ended(f"what the other side sent is no message: {error}") from None
    except Ended:
        _close(fds)
        raise


def _receive_packet(sock: socket.socket, fds: list[int]) -> tuple[bytes, int]:
    """One packet and its flags; its descriptors are added to `fds`.

    Not by socket.recv_fds, which in Python 3.11 ignores the flags it is given.
    """
    numbers = array.array("i")
    room = socket.CMSG_SPACE((MOST_FDS + 1) * numbers.itemsize)
    packet, control, flags, _ = sock.recvmsg(MOST_INLINE + 1, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    fds += numbers
    for index in range(len(fds) - len(numbers), len(fds)):
        if (low := fds[index]) <= STDERR:  # a stream of this process is closed
            fds[index] = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, STDERR + 1)
            os.close(low)
    return packet, flags


def _decode(packet: bytes, fds: list[int]) -> Message:
    mark, content = packet[:1], packet[1:]
    if not mark:
        raise Ended("the other side has hung up")
    if mark == MEMFD:
        memfd = fds.pop(0)
        try:
            content = os.pread(memfd, sealed.check(memfd, MOST_CONTENT), 0)
        finally:
            os.close(memfd)
    text, _, data = content.partition(END_OF_TEXT)
    body = json.loads(text.decode())
    return Message(str(body.pop("kind")), body, fds, data)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
