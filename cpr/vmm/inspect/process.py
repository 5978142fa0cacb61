"""Another process: its environment, and its descriptors with what /proc has of them.

psutil knows neither the seals and flags of a descriptor nor memfds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from cpr.errors import CprError, KernelError
from cpr.state.cpr_state import STATE_NAME

SEALS = ("seal", "shrink", "grow", "write", "future-write", "exec")  # F_SEAL_*, from bit 0 on
STATE_TARGET = f"/memfd:{STATE_NAME}"
DELETED = " (deleted)"
SHARED_MEMORY = ("/memfd:", "/dev/shm/", "/anon_hugepage")
REMEDY = "it can be looked at as root, or as the user who owns it"


@dataclass(frozen=True)
class Descriptor:
    """A descriptor of another process: size and offset in bytes, `target` as /proc names it.

    `seals` is None for what cannot be sealed, `written` when the file was, in ns since 1970.
    """

    fd: int
    target: str
    inode: int
    size: int
    seals: tuple[str, ...] | None
    cloexec: bool
    offset: int
    written: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "seals": None if self.seals is None else list(self.seals)}


class Process:
    """The process `pid`.  Every method raises KernelError where it is gone or is not ours."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._folder = f"/proc/{pid}"

    def path(self, fd: int) -> str:
        """A path that opens the file of `fd` anew: with an offset of its own."""
        return f"{self._folder}/fd/{fd}"

    def descriptor(self, fd: int) -> Descriptor | None:
        """What `fd` is, or None if it is not open."""
        try:
            target = os.readlink(self.path(fd))
            status = os.stat(self.path(fd))
            info = self._information(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from error
        return Descriptor(
            fd,
            target,
            status.st_ino,
            status.st_size,
            self._seals(fd, status.st_mode),
            bool(int(info["flags"], 8) & os.O_CLOEXEC),
            int(info["pos"]),
            status.st_mtime_ns,
        )

    def _descriptors(self, wanted: Callable[[str], bool]) -> list[Descriptor]:
        """Those whose target is wanted, by number; others may be on a file system that hangs."""
        found = []
        try:
            for number in sorted(map(int, os.listdir(f"{self._folder}/fd"))):
                try:
                    target = os.readlink(self.path(number))
                except FileNotFoundError:  # it has been closed meanwhile
                    continue
                if wanted(target):
                    found.append(self.descriptor(number))
        except OSError as error:
            raise self._error(error) from error
        return [each for each in found if each is not None]

    def states(self) -> list[Descriptor]:
        """The memfds of a CPR state, the one written last first.

        Of several descriptors for one memfd, such as QEMU has before the exec, it is the highest.
        """
        found = self._descriptors(lambda target: target.removesuffix(DELETED) == STATE_TARGET)
        memfds = {each.inode: each for each in found}
        return sorted(memfds.values(), key=lambda each: each.written, reverse=True)

    def shared_memory(self) -> list[Descriptor]:
        """The memfds and shared memory files: what an update could preserve."""
        return self._descriptors(lambda target: target.startswith(SHARED_MEMORY))

    def state_variable(self) -> str | None:
        """The descriptor that the environment names, as it was when the program was started."""
        try:
            return psutil.Process(self.pid).environ().get(STATE_NAME)
        except psutil.NoSuchProcess as error:
            raise self._error(OSError(errno.ESRCH, str(error))) from error
        except psutil.AccessDenied as error:
            raise self._error(OSError(errno.EACCES, str(error))) from error

    def _information(self, fd: int) -> dict[str, str]:
        with open(f"{self._folder}/fdinfo/{fd}") as file:
            lines = (line.partition(":") for line in file)
            return {name: value.strip() for name, _, value in lines}

    def _seals(self, fd: int, mode: int) -> tuple[str, ...] | None:
        if not stat.S_ISREG(mode):  # opening a device may have an effect
            return None
        try:
            opened = os.open(self.path(fd), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            bits = fcntl.fcntl(opened, fcntl.F_GET_SEALS)
        except OSError:
            return None
        finally:
            os.close(opened)
        return tuple(name for bit, name in enumerate(SEALS) if bits >> bit & 1)

    def _error(self, error: OSError) -> CprError:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return CprError(f"there is no process {self.pid}")
        return KernelError(f"process {self.pid}", error.errno or 0, REMEDY)
