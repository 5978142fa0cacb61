"""A VMM under test: how it is started, where its files go, whose expectations hold for it."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .lab import Lab

if TYPE_CHECKING:
    from .capture import Capture

PROJECT = Path(__file__).resolve().parents[2]
GUESTS = PROJECT / "examples" / "build"
FLOPPY_SIZE = 1474560


class Target:
    """`name` is "qemu" or "cpr"; `command` is a shell-split string, without the VMM's options.

    `root` is the folder that `command` runs chrooted to, "" for none: files are then made below it,
    and the VMM is given their names without it.  `close` removes all of them.
    """

    def __init__(self, name: str, command: str, root: str = "") -> None:
        self.name = name
        self.command = shlex.split(command)
        self.root = (root or _chroot(self.command)).rstrip("/")
        parent = f"{self.root}/tmp"
        self.folder = Path(tempfile.mkdtemp(prefix="conformance-", dir=parent))
        self._boot_sector = _boot_sector()
        self._labs = 0
        _inherit_nothing()

    def close(self) -> None:
        shutil.rmtree(self.folder)

    @contextmanager
    def lab(self) -> Iterator[Lab]:
        """A fresh folder to start VMMs in; afterwards they are ended and it is removed."""
        self._labs += 1
        directory = self.folder / str(self._labs)
        directory.mkdir()
        lab = Lab(self, directory)
        try:
            yield lab
        finally:
            lab.close()
            shutil.rmtree(directory)

    def inside(self, path: Path) -> str:
        """The name that the VMM knows a file by."""
        return str(path).removeprefix(self.root)

    def make_image(self, path: Path) -> None:
        """Makes the floppy that boots the guest, if it is not there."""
        if not path.exists():
            path.write_bytes(self._boot_sector)
            os.truncate(path, FLOPPY_SIZE)

    @cached_property
    def capture(self) -> Capture:
        """What one update of the VMM wrote: made by the first row that damages it."""
        from .capture import take

        return take(self)


def _chroot(command: list[str]) -> str:
    """The folder in `chroot FOLDER …`."""
    if len(command) > 2 and os.path.basename(command[0]) == "chroot":
        return command[1]
    return ""


def _boot_sector() -> bytes:
    """The guest that counts at 0x8000, at 100 Hz; built where it is not."""
    subprocess.run(["make", "-s", "-C", str(GUESTS.parent)], check=True)
    return (GUESTS / "timer.bin").read_bytes()


def _inherit_nothing() -> None:
    """Keeps descriptors that we happen to have, and core files, from the processes under test."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                continue
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
