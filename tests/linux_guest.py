"""A Linux guest under test: Debian's kernel, and a shell on its console that is told what to do."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

import pytest
from harness.vm import Vm
from waiting import SLOW

from examples.linux import build as linux

BOOT_SECONDS = 200.0
ANSWER_SECONDS = 40.0 * SLOW
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


class LinuxGuest:
    """examples/linux.cfg with its console on a socket.  `close` is the Vm's."""

    def __init__(self, start, folder: Path, *arguments: str, seconds: float = BOOT_SECONDS) -> None:
        self._path = f"{folder}/console.sock"
        self._state = f"{folder}/state"
        console = f"socket,id=com1,path={self._path},server=on,wait=off"
        self.vm: Vm = start(
            "examples/linux.cfg", "-monitor", "none", "-chardev", console, *arguments
        )
        self._commands = 0
        self._unread = ""
        self._socket: socket.socket | None = None
        self._connect()
        self.read_until(PROMPT, seconds)

    def _connect(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(ANSWER_SECONDS)
            try:
                self._socket.connect(self._path)
                return
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def read_until(self, text: str, seconds: float = ANSWER_SECONDS) -> str:
        """What the guest writes on its console up to `text`."""
        assert self._socket is not None
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} on the console: {self._unread[-2000:]!r}"
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            assert data, f"the console was closed: {self._unread[-2000:]!r}"
            self._unread += data.decode(errors="replace").replace("\r", "")
        read, _, self._unread = self._unread.partition(text)
        return read

    def type(self, line: str) -> None:
        assert self._socket is not None
        self._socket.sendall(f"{line}\n".encode())

    def ask(self, command: str) -> str:
        """What the shell answers to a command line."""
        self._commands += 1
        number = self._commands
        self.type(f"echo be''gin-{number}; {command}; echo e''nd-{number}")
        self.read_until(f"begin-{number}\n")
        return self.read_until(f"end-{number}\n").strip()

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
        """An update, "early" or "late"; the console is connected again."""
        assert self._socket is not None
        self._socket.close()
        if way == "early":
            self.vm.update()
        else:
            command = [*self.vm.words, "-incoming", f"file:{self._state}"]
            self.vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
            self.vm.qmp.command("migrate", uri=f"file:{self._state}")
            self.vm.reconnect()
        self._connect()

    def troubles(self) -> list[str]:
        """Lines of the kernel's log that tell of trouble with time."""
        return [line for line in self.ask("dmesg").splitlines() if TROUBLE.search(line)]

    def clock(self) -> tuple[int, int, int]:
        """What `clockwatch /tmp/clock` has seen: reads, steps back, the longest step in ms."""
        reads, back, longest = self.ask("cat /tmp/clock").split()
        return int(reads), int(back), int(longest)
