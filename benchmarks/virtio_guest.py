"""The Linux guest in which virtio devices are measured: the same for every VMM.

Each VMM has a network namespace of its own, in which the host's end of its tap is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from harness.console import Console
from harness.network import GUEST
from harness.vm import Vm

from benchmarks.cases import MIB
from benchmarks.peer import Peer
from examples.linux import build as linux
from examples.linux.cpio import Archive

SOURCE = Path(__file__).with_name("guest_io.c")
PROGRAM = "bin/guest-io"
TMPFS = "/dev/shm"
DISK = 256 * MIB
RAM = "512M"
BOOT_SECONDS = 120.0
PROMPT = "/ # "
KERNEL_LINE = "console=ttyS0 panic=-1 mitigations=off nokaslr quiet"
SECONDS = 60


def initrd(folder: Path) -> bytes:
    """The example's, and behind it an archive with the program that the guest runs."""
    program = folder / "guest-io"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(program)]
    subprocess.run([*command, str(SOURCE)], check=True, timeout=SECONDS)
    archive = Archive()
    archive.file(PROGRAM, program.read_bytes(), 0o755)
    program.unlink()
    first = (linux.build() / linux.INITRD).read_bytes()
    return first + bytes(-len(first) % 512) + archive.finish()


def start(accel: str, peer: Peer | None, stack: ExitStack) -> tuple[Vm, Console]:
    """Boots the guest of this VMM, or of `peer`, up to its shell, with disk and network.

    It runs in the caller's network, which `own_network` has made.  What is opened belongs to
    `stack`.  Raises OSError, RuntimeError, or linux.Unavailable.
    """
    root = "" if peer is None else peer.root
    if not os.path.ismount(f"{root}{TMPFS}"):
        raise RuntimeError(f"{root}{TMPFS} is no tmpfs")
    name = stack.enter_context(tempfile.TemporaryDirectory(dir=f"{root}{TMPFS}", prefix="cpr-io-"))
    folder, seen = Path(name), name.removeprefix(root)
    (folder / "initrd").write_bytes(initrd(folder))
    shutil.copy(linux.build() / linux.KERNEL, folder / "kernel")
    (folder / "disk").write_bytes(os.urandom(DISK))
    vm = stack.enter_context(
        Vm(
            *("-nodefaults", "-display", "none", "-accel", accel, "-m", RAM),
            *("-object", f"memory-backend-memfd,id=ram0,size={RAM},share=on"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-kernel", f"{seen}/kernel", "-initrd", f"{seen}/initrd", "-append", KERNEL_LINE),
            *("-chardev", f"socket,id=com1,path={seen}/console,server=on,wait=off"),
            *("-device", "isa-serial,chardev=com1"),
            *("-drive", f"file={seen}/disk,format=raw,if=none,id=d0"),
            *("-device", "virtio-blk-pci,drive=d0"),
            *("-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"),
            *("-device", "virtio-net-pci,netdev=n0"),
            command=None if peer is None else peer.command,
            root=root,
        )
    )
    console = Console(f"{folder}/console")
    stack.callback(console.close)
    console.read_until(PROMPT, BOOT_SECONDS)
    console.ask(f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0")
    return vm, console
