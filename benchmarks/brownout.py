"""The brown-out of an update: how much longer a guest that writes to every page needs for that.

The guest (examples/sweep.S) writes a word to each page of its RAM, over and over.  A new VMM's
page tables are empty, so that each first write to a page costs a fault.  Measured is the time from
the moment at which the guest stands still until it has written every page once more, the pause
included, and just before that the time for as many pages without an update.  The difference is
what the update cost the guest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from harness.vm import HEARTBEAT

from benchmarks.cases import GIB, MIB, Case
from benchmarks.machines import (
    update,
    wait_for_heartbeat,
    wait_until_populated,
)
from benchmarks.observer import Observer
from benchmarks.report import CASE_COLUMNS, case_cells, milliseconds, place, table
from benchmarks.rounds import Timed, left_out

START, END, SWEEPS = 0x9000, 0x9008, 0x9010
FIRST = MIB
BLOCK = 16 * 4096
BELOW_HOLE = 3 * GIB  # RAM from 3.5 GiB on has a hole here
POLL = 0.0005
TIMEOUT = 120.0


class Sweeper(Timed):
    """A VM whose guest sweeps, under its observer."""

    guest = "sweep"
    touches = True

    def begin(self, stack: ExitStack) -> None:
        end = min(self.case.ram, BELOW_HOLE)
        self._blocks = (end - FIRST) // BLOCK
        self._set(START, FIRST)
        self._set(END, end)
        self._wait(lambda: self.vm.u64(SWEEPS) >= 1, "the first sweep")
        self._observer = stack.enter_context(Observer(self.vm.ram_path()))

    def _set(self, address: int, value: int) -> None:
        self.vm.ram[address : address + 8] = value.to_bytes(8, "little")

    def turn(self) -> None:
        """Adds a round, in ms: `without` and `with` an update, and its `pause`."""
        vm = self.vm
        vm.qmp.command("cont")
        # Once through, so that what stopping did to the page tables is not counted.
        self._sweep_from(vm.u32(HEARTBEAT))
        begin = time.monotonic_ns()
        without = self._sweep_from(vm.u32(HEARTBEAT)) - begin
        self._observer.window()
        update(vm, self.case, self.peer)
        wait_for_heartbeat(vm)
        window = self._observer.window()
        if window.backwards:
            raise RuntimeError("the guest's counter went back")
        end = self._sweep_from(window.before)
        wait_until_populated(vm, self.case)
        vm.qmp.command("stop")
        self.rounds.append(
            {
                "without": without / 1e6,
                "with": (end - window.start_ns) / 1e6,
                "pause": window.milliseconds,
            }
        )

    def _sweep_from(self, counter: int) -> int:
        """When the guest has written all pages since `counter` (CLOCK_MONOTONIC, ns)."""

        def done() -> bool:
            return (self.vm.u32(HEARTBEAT) - counter) & 0xFFFFFFFF >= self._blocks

        self._wait(done, "a sweep")
        return time.monotonic_ns()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} is not done after {TIMEOUT:.0f} s: {self.vm.stderr}")
            time.sleep(POLL)


def markdown(entries: list[dict[str, Any]]) -> str:
    """A row for each case that was measured."""
    rows = []
    for entry in sorted(entries, key=lambda entry: place(Case.from_dict(entry))):
        if not entry["skipped"]:
            rounds = entry["rounds"]
            without, with_update, pause = (
                median(each[name] for each in rounds) for name in ("without", "with", "pause")
            )
            cost = median(each["with"] - each["without"] for each in rounds)
            figures = map(milliseconds, (without, with_update, cost, pause))
            rows.append([*case_cells(Case.from_dict(entry)), *figures, str(len(rounds))])
    columns = ("sweep ms", "with an update ms", "difference ms", "its pause ms", "updates")
    return table((*CASE_COLUMNS, *columns), rows)


def line(entry: dict[str, Any]) -> str:
    if text := left_out(entry):
        return text
    label = Case.from_dict(entry).label
    without = median(each["without"] for each in entry["rounds"])
    with_update = median(each["with"] for each in entry["rounds"])
    return (
        f"{label}: a sweep takes {milliseconds(without)} ms, "
        f"{milliseconds(with_update)} ms from an update on"
    )
