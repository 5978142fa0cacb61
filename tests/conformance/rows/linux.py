"""A Linux guest: examples/linux.cfg boots the same kernel to the same prompt, with a disk."""

from __future__ import annotations

import hashlib
import os
import shutil

from harness.console import Console

from examples.linux import build as linux

from ..lab import Lab
from ..match import Mismatch, Unavailable
from ..row import Row, step
from ..steps import comes_to, connect, exits, start

CONFIG = linux.HERE.parent / "linux.cfg"
FOLDER = "examples/build/linux"
PROMPT = "/ # "
BOOT_SECONDS = 100.0
BLOCK = b"written by the guest".ljust(512, b"\0")
DEVICES = """
[drive "d0"]
  file = "{folder}/disk.img"
  format = "raw"
  if = "none"

[device "disk0"]
  driver = "virtio-blk-pci"
  drive = "d0"
  serial = "DISK1"

[device "rng0"]
  driver = "virtio-rng-pci"
"""


@step
def write_config(lab: Lab) -> None:
    """$dir/linux.cfg: the example's, with TCG, the console at $dir/console, a disk and a source."""
    try:
        folder = linux.build()
    except linux.Unavailable as lack:
        raise Unavailable(str(lack)) from None
    for name in (linux.KERNEL, linux.INITRD):
        shutil.copy(folder / name, lab.path(f"$dir/{name}"))
    text = CONFIG.read_text().replace(FOLDER, lab.names["dir"])
    changes = {
        '"kvm:tcg"': '"tcg"',
        '"monitor.sock"': f'"{lab.names["dir"]}/monitor.sock"',
        'backend = "stdio"\n  signal = "off"': (
            f'backend = "socket"\n  path = "{lab.names["dir"]}/console"\n'
            '  server = "on"\n  wait = "off"'
        ),
    }
    for old, new in changes.items():
        if old not in text:
            raise Mismatch(f"linux.cfg has no {old}")
        text = text.replace(old, new)
    lab.path("$dir/linux.cfg").write_text(text + DEVICES.format(folder=lab.names["dir"]))
    lab.path("$dir/disk.img").write_bytes(os.urandom(1 << 20))


@step
def works_with_its_disk(lab: Lab) -> None:
    """The shell's prompt comes; the disk is read and written, and the random source is there."""
    disk = lab.path("$dir/disk.img")
    before = hashlib.md5(disk.read_bytes()).hexdigest()
    try:
        console = Console(str(lab.path("$dir/console")))
        console.read_until(PROMPT, BOOT_SECONDS)
        answers = {
            "md5sum </dev/vda": f"{before}  -",
            "cat /sys/block/vda/serial": "DISK1",
            "cat /sys/class/misc/hw_random/rng_current": "virtio_rng.0",
            "printf 'written by the guest' | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null": "",
        }
        for command, expected in answers.items():
            if (answer := console.ask(command)) != expected:
                raise Mismatch(f"{command}: {answer!r}, not {expected!r}")
        console.close()
    except (OSError, RuntimeError) as error:
        raise Mismatch(str(error)) from None
    if disk.read_bytes()[: len(BLOCK)] != BLOCK:
        raise Mismatch("what the guest has written is not in the image")


@step
def press_power_button(lab: Lab) -> None:
    lab.vm.query("system_powerdown")


ROWS = [
    Row(
        "linux-prompt",
        "linux: -readconfig boots kernel, initrd and disk; the power button ends the guest",
        write_config(),
        start("-nodefaults -display none -readconfig $dir/linux.cfg"),
        connect(),
        comes_to("running"),
        works_with_its_disk(),
        press_power_button(),
        exits(0),
    ),
]
