"""The phases of an update as the VMM itself reports them (cpr/phases.py)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from cpr.phases import FILE_SIZE, NAMES, SLOT_SIZE

END = "run"
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

    def read(self, exec_end_ns: int) -> dict[str, float]:
        """The length of each phase in ms, in the order in which they came; {} without any.

        `exec_end_ns` is when the exec closed the monitor's socket, as its client saw it.  A client
        that was so late that the new image ran already cannot tell exec and interpreter apart:
        both are left out then.
        """
        data = self.path.read_bytes()
        begins = {}
        for number, name in enumerate(NAMES):
            slot = data[number * SLOT_SIZE : (number + 1) * SLOT_SIZE]
            if begin := int.from_bytes(slot, "little"):
                begins[name] = begin
        if not begins:
            return {}
        in_time = begins.get(EXEC, 0) < exec_end_ns < begins.get(AFTER, 0)
        if in_time:
            begins[EXEC_END] = exec_end_ns
        ordered = sorted(begins, key=lambda name: begins[name])
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
