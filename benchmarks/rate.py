"""How many updates a second a guest survives, one right after the other.

The next update is asked for as soon as the monitor is there again and the guest has counted on.
What the guest kept of its speed is how far it counted, against how far it counts without updates.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from harness.vm import HEARTBEAT

from benchmarks.cases import Case
from benchmarks.machines import update, wait_for_heartbeat
from benchmarks.report import CASE_COLUMNS, case_cells, place, table
from benchmarks.rounds import Timed, left_out

UPDATES = 20
UNDISTURBED = 0.5  # seconds


class Runner(Timed):
    """A VM that is updated UPDATES times in a row in its turn."""

    def turn(self) -> None:
        """Adds a round: updates in a second, and the part of its speed that the guest kept."""
        vm = self.vm
        vm.qmp.command("cont")
        wait_for_heartbeat(vm)
        begin, first = time.monotonic(), vm.u32(HEARTBEAT)
        time.sleep(UNDISTURBED)
        speed = _step(first, vm.u32(HEARTBEAT)) / (time.monotonic() - begin)
        counted = 0
        begin, last = time.monotonic(), vm.u32(HEARTBEAT)
        for number in range(1, UPDATES + 1):
            update(vm, self.case, self.peer)
            wait_for_heartbeat(vm)
            counter = vm.u32(HEARTBEAT)
            step = _step(last, counter)
            if step >> 31:
                raise RuntimeError(f"the guest's counter went back in update {number} of the row")
            counted += step
            last = counter
        seconds = time.monotonic() - begin
        self.rounds.append({"rate": UPDATES / seconds, "kept": counted / seconds / speed})
        vm.qmp.command("stop")


def _step(before: int, after: int) -> int:
    """How far a 32-bit counter that may have come round has gone on."""
    return (after - before) & 0xFFFFFFFF


def markdown(entries: list[dict[str, Any]]) -> str:
    """A row for each case that was measured."""
    rows = []
    for entry in sorted(entries, key=lambda entry: place(Case.from_dict(entry))):
        if not entry["skipped"]:
            rate, kept = (median(r[name] for r in entry["rounds"]) for name in ("rate", "kept"))
            figures = [f"{rate:.1f}", f"{kept:.0%}", str(UPDATES * len(entry["rounds"]))]
            rows.append([*case_cells(Case.from_dict(entry)), *figures])
    columns = ("updates a second", "speed that the guest kept", "updates")
    return table((*CASE_COLUMNS, *columns), rows)


def line(entry: dict[str, Any]) -> str:
    if text := left_out(entry):
        return text
    label = Case.from_dict(entry).label
    return f"{label}: {median(r['rate'] for r in entry['rounds']):.1f} updates a second"
