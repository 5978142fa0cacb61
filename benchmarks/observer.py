"""The observer process: what a guest's pause is to somebody outside the VMM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from harness.vm import HEARTBEAT, ROOT

SOURCE = Path(__file__).with_name("observer.c")
BINARY = ROOT / "build" / "observer"
POLL_US = 50  # 10 would take more than half of a CPU in a virtual machine
CALIBRATION = 0.5  # seconds


@dataclass(frozen=True)
class Window:
    """The time between two questions.

    The longest gap that ended in it: the counter stood still from `start_ns` (CLOCK_MONOTONIC)
    for `length_ns`, give or take `error_ns`, at `before`, and was next seen as `after`; the time
    that it took to count so far is no part of the gap.  `open_ns`: it stands still since then.
    `backwards`: how often it ever went back.  `polls` and `latest_ns`: how often the observer
    looked, and the longest time that it did not.
    """

    start_ns: int
    length_ns: int
    error_ns: int
    before: int
    after: int
    open_ns: int
    backwards: int
    polls: int
    latest_ns: int

    @property
    def milliseconds(self) -> float:
        """The longest gap."""
        return self.length_ns / 1e6


def build() -> Path:
    """Compiles the observer if its source is newer; returns the binary."""
    if not BINARY.exists() or BINARY.stat().st_mtime < SOURCE.stat().st_mtime:
        BINARY.parent.mkdir(exist_ok=True)
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
        subprocess.run([*command, "-o", str(BINARY), str(SOURCE)], check=True)
    return BINARY


class Observer:
    """Watches the 32-bit counter at `offset` in the RAM at `path`; a context manager.

    It runs on the last CPU that this process may use, and where it may under SCHED_FIFO
    (`realtime`), so that a busy machine does not keep it from looking.  Raises RuntimeError where
    it cannot start.
    """

    def __init__(self, path: str, offset: int = HEARTBEAT, poll_us: int = POLL_US) -> None:
        command = [str(build()), path, hex(offset), str(poll_us)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.backwards = 0
        self.cpu = max(os.sched_getaffinity(0))
        try:
            os.sched_setaffinity(self._process.pid, {self.cpu})
            self.realtime = bool(self._answer("ready")[1])
        except BaseException:
            self.__exit__()
            raise

    def _answer(self, expected: str) -> list[int]:
        assert self._process.stdout is not None and self._process.stderr is not None
        word, *numbers = self._process.stdout.readline().split() or [""]
        if word != expected:
            raise RuntimeError(self._process.stderr.read().strip() or "the observer has ended")
        return [int(number) for number in numbers]

    def window(self) -> Window:
        """Ends the window that began with the last call, and begins the next."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        window = Window(*self._answer("window"))
        self.backwards = window.backwards
        return window

    def window_of(self, seconds: float) -> Window:
        """A window of its own."""
        self.window()
        time.sleep(seconds)
        return self.window()

    def rest(self) -> None:
        """Stops looking, so that it takes nothing from others; `look` is the inverse."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def look(self) -> None:
        """Looks again; the gap in between belongs to the window that is open."""
        os.kill(self._process.pid, signal.SIGCONT)

    def cpu_ns(self) -> int:
        """The CPU time that it has taken so far."""
        with open(f"/proc/{self._process.pid}/schedstat") as file:
            return int(file.read().split()[0])

    def stop(self) -> None:
        assert self._process.stdin is not None
        self.look()
        self._process.stdin.close()
        self._process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert file is not None
            file.close()


def calibrate(poll_us: int) -> dict[str, float | bool]:
    """What an observer is worth here, and what it takes from the others.

    The mean and longest interval between two looks in µs, the share of a CPU that they take, and
    whether it is under SCHED_FIFO.
    """
    fd = os.memfd_create("calibration")
    try:
        os.ftruncate(fd, HEARTBEAT + 4)
        with Observer(f"/proc/{os.getpid()}/fd/{fd}", HEARTBEAT, poll_us) as observer:
            observer.window()
            begin, used = time.monotonic_ns(), observer.cpu_ns()
            time.sleep(CALIBRATION)
            window = observer.window()
            length, used = time.monotonic_ns() - begin, observer.cpu_ns() - used
            return {
                "interval_us": length / window.polls / 1e3,
                "latest_us": window.latest_ns / 1e3,
                "cpu_share": used / length,
                "realtime": observer.realtime,
            }
    finally:
        os.close(fd)
