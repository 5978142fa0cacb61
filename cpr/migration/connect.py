"""Connections to a peer that may not answer: whoever waits for one can be called away."""

from __future__ import annotations

import errno
import os
import select
import socket

from cpr.errors import MigrationError
from cpr.migration.address import describe, port_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.migration.cancellation import Cancellation

RETRY_MS = 20
"""How often a unix socket is tried whose queue of connections is full: nothing tells of room."""


def connect(address: dict, cancellation: Cancellation) -> int:
    """A connected socket, non-blocking, the caller's.

    Raises MigrationError with QEMU's text, also where it is cancelled; then nothing stays open.
    """
    problem: Exception = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    try:
        for family, where in _targets(address):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                _connect(sock, where, cancellation)
                return sock.detach()
            except OSError as error:
                sock.close()
                problem = error
    except (OSError, ValueError, OverflowError) as error:
        problem = error
    reason = problem.strerror if isinstance(problem, OSError) else ""
    raise MigrationError(
        f"Failed to connect to '{describe(address)}': {reason or problem}"
    ) from None


def _targets(address: dict) -> list[tuple[int, Any]]:
    if address["type"] == "unix":
        return [(socket.AF_UNIX, address["path"])]
    found = socket.getaddrinfo(address["host"], port_of(address), type=socket.SOCK_STREAM)
    return [(family, where) for family, _, _, _, where in found]


def _connect(sock: socket.socket, where: Any, cancellation: Cancellation) -> None:
    """Raises OSError, ECANCELED among others."""
    sock.setblocking(False)
    while True:
        cancellation.check()
        error = sock.connect_ex(where)
        if error == errno.EINPROGRESS:
            cancellation.wait(sock.fileno(), select.POLLOUT)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        elif error == errno.EAGAIN:
            cancellation.sleep(RETRY_MS)
            continue
        if error:
            raise OSError(error, os.strerror(error))
        return
