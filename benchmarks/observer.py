"""The observer process: what a guest's pause is to somebody outside the VMM."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_name("observer.c")
BINARY = ROOT / "build" / "observer"
HEARTBEAT = 0x8000
THRESHOLD_US = 200


@dataclass(frozen=True)
class Gap:
    """The counter stood still from `start_ns` (CLOCK_MONOTONIC) for `length_ns`."""

    start_ns: int
    length_ns: int
    before: int
    after: int


def build() -> Path:
    """Compiles the observer if its source is newer; returns the binary."""
    if not BINARY.exists() or BINARY.stat().st_mtime < SOURCE.stat().st_mtime:
        BINARY.parent.mkdir(exist_ok=True)
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
        subprocess.run([*command, "-o", str(BINARY), str(SOURCE)], check=True)
    return BINARY


class Observer:
    """Watches the 32-bit counter at `offset` in the RAM behind `path` until `stop`."""

    def __init__(self, path: str, offset: int = HEARTBEAT, poll_us: int = 20) -> None:
        command = [str(build()), path, hex(offset), str(poll_us), str(THRESHOLD_US)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.gaps: list[Gap] = []
        self.backwards = 0
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(10):
            raise RuntimeError("the observer did not start")
        os.sched_setaffinity(self._process.pid, {max(os.sched_getaffinity(0))})

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, *numbers = line.split()
            if word == "gap":
                self.gaps.append(Gap(*map(int, numbers)))
            elif word == "backwards":
                self.backwards += 1
            self._ready.set()

    def longest_since(self, start_ns: int) -> Gap | None:
        """The longest gap that ended after `start_ns`."""
        gaps = [gap for gap in list(self.gaps) if gap.start_ns + gap.length_ns >= start_ns]
        return max(gaps, key=lambda gap: gap.length_ns, default=None)

    def stop(self) -> None:
        """Ends the observer and takes in what it still had to say."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join(10)
        self._process.wait(10)
