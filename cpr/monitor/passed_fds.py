"""Descriptors that monitor clients handed over with SCM_RIGHTS, by name and in sets.

They are close-on-exec and belong to this table until `take`, `close`, `remove` or `close_all`.
One in a set has a number for its clients, the descriptor's where it came in; after an update, over
which the table goes with the clients, the descriptor may be another.
"""

from __future__ import annotations

import errno
import fcntl
import os

from cpr.errors import CommandError, MigrationError
from cpr.state.connections import Kept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class PassedFds:
    """One table for all monitors: a name that one of them got can be used by another."""

    def __init__(self) -> None:
        self._named: dict[str, int] = {}
        self._sets: dict[int, list[tuple[int, str | None, int]]] = {}  # number, opaque, descriptor

    def save(self) -> Kept:
        """All of it, for `adopt` in another image; the descriptors stay this table's."""
        kept = Kept({"names": list(self._named), "sets": []})
        for index, fd in enumerate(self._named.values()):
            kept.fds[f"name{index}"] = fd
        for set_id, members in self._sets.items():
            for number, opaque, fd in members:
                kept.fds[f"set{len(kept.data['sets'])}"] = fd
                kept.data["sets"].append([set_id, number, opaque])
        return kept

    def adopt(self, kept: Kept) -> None:
        """Owns what another table has saved."""
        for index, name in enumerate(kept.data["names"]):
            if (fd := kept.take(f"name{index}")) >= 0:
                self._named[name] = fd
        for index, (set_id, number, opaque) in enumerate(kept.data["sets"]):
            if (fd := kept.take(f"set{index}")) >= 0:
                self._sets.setdefault(set_id, []).append((number, opaque, fd))

    def add(self, name: str, fd: int) -> None:
        """Owns `fd` under `name`; one that had the name is closed.

        Raises CommandError for a name that begins with a digit, and then has closed `fd`.
        """
        if name[:1].isdigit():
            os.close(fd)
            raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
        old = self._named.pop(name, None)
        if old is not None:
            os.close(old)
        self._named[name] = fd

    def take(self, name: str) -> int:
        """Gives the descriptor and its ownership.  Raises MigrationError for an unknown name."""
        if name not in self._named:
            raise MigrationError(f"File descriptor named '{name}' has not been found")
        return self._named.pop(name)

    def close(self, name: str) -> None:
        """closefd.  Raises CommandError for an unknown name."""
        if name not in self._named:
            raise CommandError(f"File descriptor named '{name}' not found")
        os.close(self._named.pop(name))

    def add_to_set(self, set_id: int | None, fd: int, opaque: str | None) -> tuple[int, int]:
        """Owns `fd` in set `set_id`, or in the first free one; the set's number, and its own there.

        Raises CommandError for a negative number, and then has closed `fd`.
        """
        if set_id is None:
            set_id = next(i for i in range(len(self._sets) + 1) if i not in self._sets)
        elif set_id < 0:
            os.close(fd)
            raise CommandError("Parameter 'fdset-id' expects a non-negative value")
        taken = [number for members in self._sets.values() for number, _, _ in members]
        number = fd if fd not in taken else max(taken) + 1
        self._sets.setdefault(set_id, []).append((number, opaque, fd))
        return set_id, number

    def remove(self, set_id: int, fd: int | None) -> None:
        """remove-fd: closes one descriptor of the set, or all.  Raises CommandError."""
        members = self._sets.get(set_id, [])
        doomed = [member for member in members if fd is None or member[0] == fd]
        if not doomed:
            which = f"fdset-id:{set_id}" + ("" if fd is None else f", fd:{fd}")
            raise CommandError(f"File descriptor named '{which}' not found")
        for member in doomed:
            members.remove(member)
            os.close(member[2])
        if not members:
            del self._sets[set_id]

    def find(self, set_id: int, writable: bool) -> int:
        """The set's first descriptor for that access, which stays the set's.

        Raises OSError as opening a file does: ENOENT without a set, EACCES without a fitting fd.
        """
        if set_id not in self._sets:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        for _, _, fd in self._sets[set_id]:
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if access in (os.O_RDWR, os.O_WRONLY if writable else os.O_RDONLY):
                return fd
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def query_sets(self) -> list[dict[str, Any]]:
        return [
            {
                "fdset-id": set_id,
                "fds": [
                    {"fd": number} if opaque is None else {"fd": number, "opaque": opaque}
                    for number, opaque, _ in members
                ],
            }
            for set_id, members in sorted(self._sets.items())
        ]

    def close_all(self) -> None:
        for name in list(self._named):
            self.close(name)
        for set_id in list(self._sets):
            self.remove(set_id, None)
