"""The socket on which the source of a migration will connect."""

from __future__ import annotations

import os
import select
import stat

from cpr.errors import MigrationError
from cpr.migration.address import describe, port_of
from cpr.migration.cancellation import Cancellation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

    from cpr.migration.channel import Channel


class Listener:
    """A listening socket, which it owns until `accept` or `close`; both remove a unix path.

    `fd` is readable once a source is there.
    """

    def __init__(self, address: dict) -> None:
        """Raises MigrationError with QEMU's text."""
        import socket

        self._path = address["path"] if address["type"] == "unix" else ""
        self._inode = 0
        self._socket: socket.socket | None = None
        try:
            self._cancellation = Cancellation()
        except OSError as error:
            raise MigrationError(f"Failed to listen: {error.strerror}") from None
        try:
            if self._path:
                self._socket = listen_at(self._path)
                self._inode = os.stat(self._path).st_ino
            else:
                self._socket = socket.create_server((address["host"], port_of(address)))
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            reason = error.strerror if isinstance(error, OSError) else ""
            raise MigrationError(
                f"Failed to bind socket to {describe(address)}: {reason or error}"
            ) from None

    @property
    def fd(self) -> int:
        assert self._socket is not None
        return self._socket.fileno()

    def accept(self) -> Channel:
        """Waits for the source and closes the listener; the channel is the caller's.

        Raises MigrationError where `shutdown` comes first, or there is no connection.
        """
        from cpr.migration.channel import Channel

        assert self._socket is not None
        try:
            self._cancellation.wait(self._socket.fileno(), select.POLLIN)
            connection = self._socket.accept()[0]
        except OSError as error:
            raise MigrationError(f"Failed to accept the source: {error.strerror}") from None
        finally:
            self.close()
        return Channel(connection.detach(), "socket")

    def shutdown(self) -> None:
        """Ends an `accept`, as Channel.shutdown does a read; from any thread."""
        self._cancellation.cancel()

    def close(self) -> None:
        """May be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._cancellation.close()
        try:
            if self._inode and os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except OSError:
            pass  # somebody else has removed it
        self._inode = 0


def listen_at(path: str) -> socket:
    """A unix socket that listens at `path`, for its owner only; one left over there is removed.

    Raises OSError; EADDRINUSE where something else than a socket is there.
    """
    import socket

    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # bind gives it to the file
        listener.bind(path)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener
