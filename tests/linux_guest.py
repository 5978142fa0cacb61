"""A Linux guest under test: Debian's kernel, and a shell on its console that is told what to do."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from harness.console import Console
from harness.vm import Vm

from examples.linux import build as linux

BOOT_SECONDS = 200.0
PROMPT = "/ # "
# What a kernel says of clocks that cannot be right, and of vCPUs that stood still unawares.
TROUBLE = re.compile(
    r"unstable|skew|lockup|hrtimer: interrupt took|stall|Not enough CPUs|Unable to|BUG:|WARNING:",
    re.IGNORECASE,
)


@pytest.fixture(scope="session")
def linux_image() -> Path:
    """The folder of kernel and initrd; the test is skipped where the packages cannot be had."""
    try:
        return linux.build()
    except linux.Unavailable as error:
        pytest.skip(str(error))


class LinuxGuest(Console):
    """examples/linux.cfg with its console on a socket; `vm` is closed by `start`."""

    def __init__(self, start, folder: Path, *arguments: str, seconds: float = BOOT_SECONDS) -> None:
        path = f"{folder}/console.sock"
        self._state = f"{folder}/state"
        console = f"socket,id=com1,path={path},server=on,wait=off,cpr=on"
        self.vm: Vm = start(
            "examples/linux.cfg", "-monitor", "none", "-chardev", console, *arguments
        )
        super().__init__(path)
        self.read_until(PROMPT, seconds)
        self.ask("dmesg -n 1")  # what the kernel says would come in the middle of answers

    def write(self, path: str, text: str) -> None:
        """Makes a file of this text, of less than the 4096 characters that a terminal holds."""
        self.type(f"cat >{path} <<'END'\n{text.strip()}\nEND")
        self.ask("true")

    def uptime(self) -> tuple[float, float, float]:
        """The guest's CLOCK_MONOTONIC, between the host's before and after it was read; s."""
        before = time.monotonic()
        uptime = float(self.ask("cat /proc/uptime").split()[0])
        return before, uptime, time.monotonic()

    def update(self, way: str) -> None:
        """An update, "early" or "late"; the console stays connected."""
        if way == "early":
            self.vm.update()
        else:
            command = [*self.vm.words, "-incoming", f"file:{self._state}"]
            self.vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
            self.vm.qmp.command("migrate", uri=f"file:{self._state}")
            self.vm.reconnect()

    def troubles(self) -> list[str]:
        """Lines of the kernel's log that tell of trouble with time."""
        return [line for line in self.ask("dmesg").splitlines() if TROUBLE.search(line)]

    def clock(self) -> tuple[int, int, int]:
        """What `clockwatch /tmp/clock` has seen: reads, steps back, the longest step in ms."""
        reads, back, longest = self.ask("cat /tmp/clock").split()
        return int(reads), int(back), int(longest)
