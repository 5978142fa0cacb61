"""Where a socket chardev listens or connects: its options, and the socket that is made there."""

from __future__ import annotations

import errno
import os
import socket
import stat

from cpr.chardev.base import flag
from cpr.constants import UNIX_PATH_MAX
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Address = tuple[int, Any]  # family, and what bind and connect take

CONNECT_TIMEOUT = 5.0  # s, to a server that does not answer; a guest may run already


class SocketOptions:
    """The options of -chardev socket, checked.  Raises ConfigError with QEMU's texts."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.path = str(options.get("path", ""))
        self.host = str(options.get("host", ""))
        self.port = str(options.get("port", ""))
        self.server = flag(options, "server", False)
        self.wait = flag(options, "wait", self.server)
        self.nodelay = flag(options, "nodelay", False)
        self.reconnect_ms = int(options.get("reconnect-ms", 0))
        if "path" in options and "host" in options:
            raise ConfigError("None or one of 'path', 'fd' or 'host' option required.")
        if not self.path and not self.port:
            raise ConfigError("chardev: socket: no port given")
        if len(os.fsencode(self.path)) >= UNIX_PATH_MAX:
            raise ConfigError(
                f"UNIX socket path '{self.path}' is too long\n"
                f"Path must be less than {UNIX_PATH_MAX} bytes"
            )
        if self.reconnect_ms < 0:
            raise ConfigError(f"'reconnect-ms' must not be negative: {self.reconnect_ms}")
        if self.server and self.reconnect_ms:
            raise ConfigError(
                "'reconnect-ms' option is incompatible with socket in server listen mode"
            )
        if not self.server and "wait" in options:
            raise ConfigError("'wait' option is incompatible with socket in client connect mode")

    def addresses(self) -> list[Address]:
        """(family, address) of each address to try.  Raises ConfigError if there is none."""
        if self.path:
            return [(socket.AF_UNIX, self.path)]
        flags = socket.AI_PASSIVE if self.server else 0
        try:
            found = socket.getaddrinfo(
                self.host or None, self.port, type=socket.SOCK_STREAM, flags=flags
            )
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(
                f"address resolution failed for {self.host}:{self.port}: {reason}"
            ) from None
        return [(family, address) for family, _, _, _, address in found]

    def where(self) -> dict[str, str | bool]:
        return {"path": self.path, "host": self.host, "port": self.port, "server": self.server}

    def text(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp:{join(self.host, self.port)}"


def listen(options: SocketOptions, addresses: list[Address]) -> tuple[socket.socket, int]:
    """A listening socket at the first address that it can have, and the inode of its path, or 0.

    The socket is the caller's; `unlink` takes the path and its inode.  What is left over at a path
    is unlinked, as QEMU does.  Raises ConfigError; then there is none.
    """
    failure = ""
    for family, address in addresses:
        try:
            listener = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            failure = _failure(options, error)
            continue
        try:
            return listener, _bind(listener, family, address)
        except OSError as error:
            listener.close()
            failure = _failure(options, error)
        except ConfigError:
            listener.close()
            raise
    raise ConfigError(failure)


def _bind(listener: socket.socket, family: int, address: Any) -> int:
    is_unix = family == socket.AF_UNIX
    if is_unix:
        try:
            _remove_old(address)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"Failed to unlink socket {address}: {error.strerror}") from None
        os.fchmod(listener.fileno(), 0o600)  # bind gives it to the file
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(1)
    listener.setblocking(False)
    return os.stat(address).st_ino if is_unix else 0


def _failure(options: SocketOptions, error: OSError) -> str:
    if options.path:
        return f"Failed to bind socket to {options.path}: {error.strerror}"
    where = join(options.host, options.port)
    if error.errno == errno.EADDRINUSE:
        return (
            f"Failed to find an available port: {error.strerror}; {where} is taken: stop the "
            "process that listens there or give another port="
        )
    if error.errno == errno.EACCES:
        return f"Failed to bind socket: {error.strerror}; {where} needs CAP_NET_BIND_SERVICE"
    return f"Failed to bind socket: {error.strerror}; {where} is no address of this host"


def connect(options: SocketOptions, addresses: list[Address]) -> socket.socket:
    """A socket that is connected to the first address that answers; it is the caller's.

    Raises ConfigError; then there is none.
    """
    reason = ""
    for family, address in addresses:
        try:
            peer = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # no descriptor now
            reason = str(error.strerror or error)
            continue
        peer.settimeout(CONNECT_TIMEOUT)
        try:
            peer.connect(address)
            return peer
        except OSError as error:
            peer.close()
            reason = str(error.strerror or error)
    where = options.text().partition(":")[2]
    raise ConfigError(f"Failed to connect to '{where}': {reason}")


def _remove_old(path: str) -> None:
    """Removes what is there, as QEMU does, but no device or FIFO.  Raises OSError."""
    if stat.S_IFMT(os.lstat(path).st_mode) in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO):
        raise OSError(errno.EEXIST, "it is a device or a FIFO")
    os.unlink(path)


def unlink(path: str, inode: int) -> None:
    """Removes the path of a listening socket, unless another process has bound its own there."""
    try:
        if inode and os.stat(path).st_ino == inode:
            os.unlink(path)
    except OSError:
        pass


def join(host: str, port: str | int) -> str:
    """As text; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
