"""A process under test: how it is started and ended, and what /proc says about it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil

DEADLINE = 10.0
"""Seconds after which something that should have happened counts as not happening."""

POLL = 0.002
CLOEXEC = 0o2000000


class Descriptor:
    """One open file of a process: what it refers to, and whether it is closed on exec."""

    def __init__(self, target: str, inode: int, cloexec: bool) -> None:
        self.target = target
        self.inode = inode
        self.cloexec = cloexec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Descriptor) and repr(self) == repr(other)

    def __repr__(self) -> str:
        return f"<{self.target} inode {self.inode}{' cloexec' if self.cloexec else ''}>"


class Process:
    """A child of this process, waited for by its PID alone.

    It starts with no signal blocked or ignored.  `files` are the file actions of os.posix_spawn;
    stderr is appended to the file `stderr`.
    """

    def __init__(
        self, words: list[str], environment: dict[str, str], stderr: Path, files: list[tuple]
    ) -> None:
        self.stderr_path = stderr
        self.status: int | None = None
        error = (os.POSIX_SPAWN_OPEN, 2, str(stderr), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        self.pid = os.posix_spawnp(
            words[0],
            words,
            environment,
            file_actions=[*files, error],
            setsid=True,
            setsigmask=[],
            setsigdef=signal.valid_signals(),
        )

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None while the process lives."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = DEADLINE) -> int | None:
        """As poll, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
        return self.status

    def kill(self) -> None:
        """Ends the process, if it still lives, and what it has started, and waits for it.

        An old image that goes on after it is in its process group.
        """
        ended = self.poll() is not None
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if not ended:
            os.waitpid(self.pid, 0)
            self.status = -signal.SIGKILL

    def stderr_lines(self) -> list[str]:
        return self.stderr_path.read_text(errors="replace").splitlines()

    # /proc

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.pid}/{name}")

    def command_line(self) -> list[str]:
        return psutil.Process(self.pid).cmdline()

    def environment(self) -> list[str]:
        """Each NAME=value; psutil would drop one that is there twice."""
        return self._proc("environ").read_bytes().decode().split("\0")[:-1]

    def cwd(self) -> str:
        return psutil.Process(self.pid).cwd()

    def field(self, name: str) -> str:
        """A field of /proc/PID/status, which has more of signals than psutil."""
        for line in self._proc("status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        raise KeyError(name)

    def descriptors(self) -> dict[int, Descriptor]:
        found = {}
        for entry in self._proc("fd").iterdir():
            try:
                info = self._proc(f"fdinfo/{entry.name}").read_text()
                flags = next(line for line in info.splitlines() if line.startswith("flags:"))
                found[int(entry.name)] = Descriptor(
                    os.readlink(entry),
                    entry.stat().st_ino,
                    bool(int(flags.split()[1], 8) & CLOEXEC),
                )
            except FileNotFoundError:
                continue
        return found

    def open_descriptor(self, number: int, flags: int) -> int:
        """A descriptor of ours for the file of one of the process's."""
        return os.open(self._proc(f"fd/{number}"), flags)

    def offset(self, number: int) -> int:
        """The file offset of one of its descriptors."""
        return int(self._proc(f"fdinfo/{number}").read_text().split()[1])


class Snapshot:
    """A process as it was at a time."""

    def __init__(self, process: Process) -> None:
        self.descriptors = process.descriptors()
        self.environment = set(process.environment())
        self.cwd = process.cwd()
