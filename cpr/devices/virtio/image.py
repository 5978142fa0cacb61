"""The file or block device behind a disk: opened once, kept over updates, locked against others.

The locks are QEMU's, so that it and its tools respect them: a byte for each permission that is used
(100 + n), and one for each that nobody else may have (200 + n).  They belong to the open file
description; in an update that is the VMM's that has the guest, as are the locks it came with.
"""

from __future__ import annotations

import errno
import os
import stat

from cpr.errors import ConfigError
from cpr.uapi import file_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config import DriveConfig
    from cpr.state.fds import PreservedFds

SECTOR = 512
USED_BASE, UNSHARED_BASE = 100, 200
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
NAMES = ("consistent read", "write", "write unchanged", "resize")
PERMISSIONS = len(NAMES)
UNSHARED = (WRITE, RESIZE)

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class Image:
    """Owns the descriptor `fd`, which is in `fds` under the drive's id, until `close`.

    `readonly` says that it is not written; `sectors` is its size, the last one perhaps cut off.
    """

    def __init__(self, drive: DriveConfig, fds: PreservedFds, comes_later: bool) -> None:
        """Raises ConfigError.  `comes_later`: a guest will come that another VMM may yet have, so
        that the locks are taken by `lock`.
        """
        assert drive.file is not None
        self._path = drive.file
        self._name = f"drive:{drive.id}"
        self._fds = fds
        self._locking = drive.locking
        self.readonly = drive.readonly
        self._locked = came = fds.came(self._name, 0)
        self._added: list[int] = []  # by the last `lock`
        self.fd = fds.open(self._name, 0, self._open)
        try:
            self.sectors = -(-os.lseek(self.fd, 0, os.SEEK_END) // SECTOR)
            if not came and not comes_later:
                self.lock()
        except (ConfigError, OSError) as error:
            self.close()
            if isinstance(error, OSError):
                raise self._cannot_open(error) from None
            raise

    def _open(self) -> int:
        flags = os.O_RDONLY if self.readonly else os.O_RDWR
        try:
            fd = os.open(self._path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise self._cannot_open(error) from None
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            raise ConfigError(f"Could not open '{self._path}': it is neither a file nor a disk")
        return fd

    def _cannot_open(self, error: OSError) -> ConfigError:
        return ConfigError(f"Could not open '{self._path}': {error.strerror}")

    def lock(self, keeps: bool = False) -> None:
        """Locks what its use needs and its description has not locked yet.

        Raises ConfigError where another program uses it so that both cannot be; then nothing more
        is locked than before, unless it `keeps` the locks.  A file system without locks has none.
        """
        self._added = []
        used = [CONSISTENT_READ] if self.readonly else [CONSISTENT_READ, WRITE]
        missing = self._missing(used) if self._locking else []
        if not missing:
            return
        try:
            for byte in missing:
                file_lock.share(self.fd, byte)
                self._added.append(byte)
            self._locked = True
            for permission in used:
                if file_lock.is_locked(self.fd, UNSHARED_BASE + permission):
                    raise self._in_use(NAMES[permission], "")
            for permission in UNSHARED:
                if file_lock.is_locked(self.fd, USED_BASE + permission):
                    raise self._in_use(NAMES[permission], "shared ")
        except (OSError, ConfigError) as error:
            if not keeps:
                self.undo_lock()
            if isinstance(error, ConfigError):
                raise
            if error.errno not in NO_LOCKS:
                raise ConfigError(f"Failed to lock '{self._path}': {error.strerror}") from None

    def _missing(self, used: list[int]) -> list[int]:
        wanted = [USED_BASE + permission for permission in used]
        wanted += [UNSHARED_BASE + permission for permission in UNSHARED]
        held = file_lock.held(self.fd)
        if held is None:
            return [] if self._locked else wanted
        return [byte for byte in wanted if byte not in held]

    def _in_use(self, permission: str, shared: str) -> ConfigError:
        return ConfigError(
            f'Failed to get {shared}"{permission}" lock\n'
            f"Is another process using the image [{self._path}]?"
        )

    def undo_lock(self) -> None:
        """The inverse of the last `lock`: what was locked before it stays so."""
        if self._added:
            self._locked = False
        for byte in self._added:
            self._unlock(byte, 1)
        self._added = []

    def unlock(self) -> None:
        """Gives up all locks, for every VMM that shares the description."""
        self._locked, self._added = False, []
        for base in (USED_BASE, UNSHARED_BASE):
            self._unlock(base, PERMISSIONS)

    def _unlock(self, byte: int, count: int) -> None:
        try:
            file_lock.unlock(self.fd, byte, count)
        except OSError:
            pass

    def close(self) -> None:
        if self.fd >= 0:
            self._fds.delete(self._name, 0)
            os.close(self.fd)
            self.fd = -1
