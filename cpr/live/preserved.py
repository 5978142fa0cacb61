"""What goes over to the next program, by name: sockets, files, descriptors and shared memory.

An object that is kept stays the caller's, who closes it; the registry holds a reference and the
number of its descriptor.  What came from the previous program is owned by the registry until
somebody asks for it by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from typing import IO, TYPE_CHECKING, Any

from cpr.live import files, memfd
from cpr.live.errors import PreserveError, UpdateError

if TYPE_CHECKING:
    import mmap
    import socket as sockets
    from collections.abc import Callable

SOCKET, FILE, FD, MEMORY = "socket", "file", "fd", "memory"
MOST_NAME = 200  # characters


class Entry:
    """One name: `kind`, the descriptor `fd`, the object once there is one, and how to make it.

    `size` is that of memory, in bytes, as this program knows it.  What new programs can change,
    who have the same open file, comes back by `restore`.
    """

    def __init__(self, kind: str, fd: int, value: Any, how: dict[str, Any]) -> None:
        self.kind = kind
        self.fd = fd
        self.value = value
        self.how = how
        status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)
        self.size = int(how.pop("size", status.st_size)) if kind == MEMORY else status.st_size
        self._before: tuple[bool, int] | None = None

    def take(self, private: bool) -> Any:
        """The object, made of the descriptor at the first time.  Raises OSError."""
        if self.value is None:
            self.value = _build(self, private)
        return self.value

    def remember(self, stands_still: bool) -> None:
        """Before a new program has the descriptor, and again when this one `stands_still`, and
        changes nothing of the open file itself any more.

        The place counts where it only reads: what a new program has written stays.
        """
        if self.kind == MEMORY:
            return
        flags, place = fcntl.fcntl(self.fd, fcntl.F_GETFL), -1
        blocking = not flags & os.O_NONBLOCK if self._before is None else self._before[0]
        if stands_still and flags & os.O_ACCMODE == os.O_RDONLY:
            with contextlib.suppress(OSError):  # a pipe
                place = os.lseek(self.fd, 0, os.SEEK_CUR)
        self._before = blocking, place

    def restore(self) -> None:
        """The new program has failed: size, place and blocking are as before.  Raises OSError."""
        before, self._before = self._before, None
        if self.check() is not None:
            return
        if self.kind == MEMORY:
            memfd.give_back(self.fd, self._mapped())
        elif before is not None:
            if os.get_blocking(self.fd) != before[0]:
                os.set_blocking(self.fd, before[0])
            if before[1] >= 0:
                os.lseek(self.fd, before[1], os.SEEK_SET)

    def _mapped(self) -> int:
        """The bytes of a memory that this program has; its mapping may have been resized."""
        with contextlib.suppress(ValueError):  # it has been closed
            self.size = self.size if self.value is None else len(self.value)
        return self.size

    def check(self) -> str | None:
        """Why the descriptor is not the one that was kept, or None."""
        if self.kind in (SOCKET, FILE) and self.value is not None:
            try:
                if self.value.fileno() != self.fd:
                    return "it has been closed"
            except (OSError, ValueError):
                return "it has been closed"
        try:
            status = os.fstat(self.fd)
        except OSError:
            return f"its descriptor {self.fd} has been closed"
        if (status.st_dev, status.st_ino) != self.identity:
            return f"its descriptor {self.fd} is something else now"
        return None

    def describe(self) -> dict[str, Any]:
        """What the next program needs besides the descriptor; buffers of a file are written."""
        if self.kind == SOCKET and self.value is not None:
            return {"kind": self.kind, "timeout": self.value.gettimeout()}
        if self.kind == FILE and self.value is not None:
            files.synchronize(self.value)
            self.how = files.describe(self.value)
            if (place := files.place_of(self.value)) is not None:
                self.how["place"] = place
        if self.kind == MEMORY:
            return {"kind": self.kind, "size": self._mapped()}
        return {"kind": self.kind, **self.how}


class Registry:
    """The names of this process, and those of the previous one that nobody has asked for yet."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.claimed: set[str] = set()
        self.private_memory = False
        """A rehearsal: what is written to shared memory is seen here only."""

    def find(self, name: str) -> Entry | None:
        return self.entries.get(name)

    def claim(self, name: str) -> None:
        """live.socket and the like ask for `name`; raises PreserveError at the second time."""
        check_name(name)
        if name in self.claimed:
            raise PreserveError(f"'{name}' is used twice; each name stands for one thing")

    def keep(self, name: str, value: Any) -> None:
        check_name(name)
        if name in self.entries:
            raise PreserveError(f"'{name}' is used twice; each name stands for one thing")
        self.entries[name] = make_entry(name, value)
        self.claimed.add(name)

    def add(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        self.claimed.add(name)

    def take(self, name: str, kind: str | None = None) -> Any:
        """The object of that name, which is the caller's from now on.  Raises PreserveError."""
        entry = self.entries[name]
        if kind is not None and entry.kind != kind:
            raise PreserveError(f"'{name}' is a {entry.kind}, and not a {kind}")
        try:
            value = entry.take(self.private_memory)
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or error
            raise PreserveError(f"'{name}' cannot be used: {text}") from None
        self.claimed.add(name)
        return value

    def drop(self, name: str) -> None:
        """Forgets a name, and closes nothing of the caller's.  Raises PreserveError."""
        entry = self.entries.pop(name, None)
        if entry is None:
            raise PreserveError(f"'{name}' is no preserved name")
        self.claimed.discard(name)
        if entry.kind == MEMORY or entry.value is None:  # the registry's own descriptor
            os.close(entry.fd)

    def describe(self) -> dict[str, dict[str, Any]]:
        """What the next program is told of each name.  Raises UpdateError, naming all faults."""
        described, found = {}, []
        for name, entry in self.entries.items():
            why = entry.check()
            try:
                if why is None:
                    described[name] = entry.describe()
            except (OSError, ValueError) as error:  # a full disk, a loop over a file's lines
                why = str(error)
            if why is not None:
                found.append(f"'{name}' cannot go over: {why}; live.drop it")
        if found:
            raise UpdateError("; ".join(found))
        return described

    def remember(self, stands_still: bool) -> None:
        """The inverse is `restore`; see Entry.remember.  Raises OSError."""
        for entry in self.entries.values():
            entry.remember(stands_still)

    def restore(self) -> list[str]:
        """After a new program that has failed, or was rehearsed: its changes are undone.

        What could not be, each with its name: this program goes on with the others as they were.
        """
        found = []
        for name, entry in self.entries.items():
            try:
                entry.restore()
            except (OSError, ValueError) as error:
                found.append(f"'{name}' is not as it was: {getattr(error, 'strerror', error)}")
        return found

    def receive(
        self, described: dict[str, dict[str, Any]], fresh: list[str], fds: list[int]
    ) -> None:
        """Takes over what the previous program has sent: `fds` are those of the names `fresh`.

        It may go on, and its files with it: `move` comes last.
        """
        for name, fd in zip(fresh, fds, strict=True):
            old = self.entries.get(name)
            if old is not None and old.value is None:
                os.close(old.fd)
            how = dict(described[name])
            how.pop("place", None)
            self.entries[name] = Entry(str(how.pop("kind")), fd, None, how)

    def move(self, described: dict[str, dict[str, Any]]) -> None:
        """Files stand where the previous program's do, which stands still now."""
        for name, entry in self.entries.items():
            if entry.kind == FILE and (place := described.get(name, {}).get("place")) is not None:
                entry.how["place"] = place
                if entry.value is not None:
                    files.move(entry.value, place)

    def forget_unclaimed(self, present: set[str]) -> None:
        """Names that the previous program has dropped meanwhile, and nobody has asked for."""
        for name in set(self.entries) - present - self.claimed:
            os.close(self.entries.pop(name).fd)


def check_name(name: str) -> None:
    if not isinstance(name, str) or not name or len(name) > MOST_NAME or not name.isprintable():
        raise PreserveError(f"{name!r} is no name: 1 to {MOST_NAME} printable characters are one")


def check_version(version: int) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise PreserveError(f"version={version!r} is none: a version is a whole number from 0 on")


def make_entry(name: str, value: Any) -> Entry:
    """An entry for an object or a descriptor's number, the caller's.  Raises PreserveError."""
    import io
    import socket

    try:
        if isinstance(value, socket.socket):
            _check_plain(name, value)
            kind, how = SOCKET, {"timeout": value.gettimeout()}
        elif isinstance(value, io.IOBase):
            files.check(name, value)
            kind, how = FILE, files.describe(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            kind, how = FD, {}
        elif hasattr(value, "fileno"):  # asyncio's TransportSocket, a Popen's pipe, an epoll
            kind, how = (SOCKET if hasattr(value, "getsockname") else FD), {}
        else:
            raise PreserveError(f"'{name}' is a {type(value).__name__}, which has no descriptor")
        fd = value if isinstance(value, int) else value.fileno()
        return Entry(kind, fd, value, how)
    except (OSError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, PreserveError):
            raise
        raise PreserveError(f"'{name}' is closed, or has no descriptor: {error}") from None


def _check_plain(name: str, sock: sockets.socket) -> None:
    """Raises PreserveError for a socket of the module ssl, which is not loaded for this."""
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(sock, ssl.SSLSocket):
        raise PreserveError(
            f"'{name}' is a TLS socket, whose session cannot go over: end TLS before this process, "
            "or preserve the listening socket, and wrap what it accepts"
        )


def _build(entry: Entry, private: bool) -> Any:
    if entry.kind == SOCKET:
        import socket

        sock = socket.socket(fileno=entry.fd)
        timeout = entry.how.get("timeout")
        if timeout is not None:  # else it stays as it is: O_NONBLOCK is the previous program's too
            sock.settimeout(timeout)
        return sock
    if entry.kind == FILE:
        return files.build(entry.fd, entry.how)
    if entry.kind == MEMORY:
        return memfd.map_memory(entry.fd, entry.size, private=private)
    return entry.fd


def find_or_make(
    registry: Registry, name: str, kind: str, make: Callable[[], Any]
) -> sockets.socket | IO[Any] | int | mmap.mmap:
    """The preserved one of that name, else what `make` returns, kept from now on."""
    registry.claim(name)
    if registry.find(name) is not None:
        return registry.take(name, kind)
    if not callable(make):
        raise PreserveError(f"'{name}' is not there, and {make!r} cannot be called to make it")
    value = make()
    entry = make_entry(name, value)
    if entry.kind != kind:
        raise PreserveError(f"'{name}': make() returned a {type(value).__name__}, and no {kind}")
    registry.add(name, entry)
    return value
