"""Archives in cpio's format newc, which Linux unpacks as its first file system.

A member is a header of 110 characters (the magic 070701 and thirteen numbers of eight hexadecimal
digits), its path with a NUL, and its data; both are padded to a multiple of 4 bytes
(Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import stat

MAGIC = b"070701"
TRAILER = "TRAILER!!!"


class Archive:
    """Members are added one by one, folders before what is in them; all belong to root."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def folder(self, path: str) -> None:
        self._add(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        self._add(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive."""
        self._add(TRAILER, 0)
        return bytes(self._data)

    def _add(
        self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file system, device, name, check
        numbers = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        self._data += MAGIC + b"".join(b"%08x" % number for number in numbers) + name
        self._data += bytes(-len(self._data) % 4) + data
        self._data += bytes(-len(self._data) % 4)
