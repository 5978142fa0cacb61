"""The phases of an update as the VMM itself reports them (cpr/phases.py)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from cpr.phases import FILE_SIZE, NAMES, SLOT_SIZE

START, END = "stop", "run"
EXEC, EXEC_END, AFTER = "exec", "interpreter", "imports"
SHARED_MEMORY = "/dev/shm"


class Phases:
    """The file that a VMM writes its phases to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clear()

    def clear(self) -> None:
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.write(bytes(FILE_SIZE))

    def _begins(self) -> dict[str, int]:
        data = self.path.read_bytes()
        slots = (data[at : at + SLOT_SIZE] for at in range(0, FILE_SIZE, SLOT_SIZE))
        begins = (int.from_bytes(slot, "little") for slot in slots)
        return {name: begin for name, begin in zip(NAMES, begins, strict=True) if begin}

    def exclude(self, start_ns: int, length_ns: int) -> bool:
        """Whether the VMM says that the guest ran all through this gap."""
        begins = self._begins()
        if START not in begins or END not in begins:
            return False
        return start_ns >= begins[END] or start_ns + length_ns <= begins[START]

    def read(self, exec_end_ns: int) -> dict[str, float]:
        """The length of each phase in ms, in the order in which they came; {} without any.

        `exec_end_ns` is when the exec closed the monitor's socket, as its client saw it.  A client
        that was so late that the new image ran already cannot tell exec and interpreter apart:
        both are left out then.
        """
        begins = self._begins()
        if not begins:
            return {}
        in_time = begins.get(EXEC, 0) < exec_end_ns < begins.get(AFTER, 0)
        if in_time:
            begins[EXEC_END] = exec_end_ns
        ordered = sorted(begins, key=lambda name: begins[name])
        if END in begins:  # what comes later is no part of the pause
            ordered = ordered[: ordered.index(END) + 1]
        return {
            name: (begins[following] - begins[name]) / 1e6
            for name, following in pairwise(ordered)
            if name != END and (in_time or name != EXEC)
        }


@contextmanager
def phase_file() -> Iterator[Phases]:
    """A file of its own in shared memory."""
    with tempfile.TemporaryDirectory(prefix="cpr-phases-", dir=SHARED_MEMORY) as folder:
        yield Phases(Path(folder) / "phases")
