"""The listening socket of a server: of TCP, or of a Unix socket's file."""

from __future__ import annotations

import errno
import os
import socket
import stat


def listen(host: str, port: int, path: str | None, backlog: int) -> socket.socket:
    """A new one, the caller's: of `path` if there is one, else of an address.  Raises OSError."""
    if path is not None:
        return _listen_at(path, backlog)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog)


def _listen_at(path: str, backlog: int) -> socket.socket:
    """A Unix socket that listens; a file that another has left is removed.  Raises OSError."""
    made = socket.socket(socket.AF_UNIX)
    try:
        if not path.startswith("\0") and _is_left_over(path):
            os.unlink(path)
        made.bind(path)
        made.listen(backlog)
    except OSError as error:
        made.close()
        raise OSError(error.errno, error.strerror or str(error), path) from None
    return made


def _is_left_over(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        return sock.connect_ex(path) == errno.ECONNREFUSED
