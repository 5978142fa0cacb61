"""A QEMU with cpr-exec, run by chroot into the folder that it was installed in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.vm import Vm

from .guest import BUILD, READY, Guest, machine_words

PROGRAM = "qemu-system-x86_64"


def root() -> Path:
    """The folder; skips where none was given."""
    folder = os.environ.get("CPR_QEMU_ROOT")
    if folder is None:
        pytest.skip("no QEMU with cpr-exec was given: --qemu-root FOLDER")
    return Path(folder)


@contextmanager
def mounted() -> Iterator[Path]:
    """The folder with the VM's own /dev, /proc and /sys, and a /tmp that can be written."""
    folder = root()
    names = ("dev", "proc", "sys")
    try:
        for name in names:
            subprocess.run(["mount", "--rbind", f"/{name}", folder / name], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder / "tmp"], check=True)
        yield folder
    finally:
        for name in ("tmp", *reversed(names)):
            subprocess.run(["umount", "-l", folder / name], check=False)


@contextmanager
def running(name: str, folder: Path, *options: str) -> Iterator[Guest]:
    """Boots the guest under QEMU until it has its device."""
    program = folder / "tmp" / f"{name}.elf"
    shutil.copy(BUILD / program.name, program)
    words = [*machine_words(f"/tmp/{program.name}"), *options]
    command = ["chroot", str(folder), PROGRAM]
    with Vm(*words, command=command, root=str(folder), cwd="/") as vm:
        guest = Guest(name, vm)
        guest.wait("stage", READY)
        yield guest
