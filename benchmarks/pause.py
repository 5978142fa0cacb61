"""The pause of an update as the observer sees it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.cases import Case
from benchmarks.machines import (
    choose_mode,
    keep_vcpus_off,
    started,
    update,
    wait_for_heartbeat,
    wait_until_populated,
)
from benchmarks.observer import POLL_US, Observer, Window
from benchmarks.peer import Peer
from benchmarks.quantiles import percentile
from benchmarks.rounds import Progress, take_turns
from benchmarks.settings import shmem_hugepages

SETTLE = 0.1  # how long a window goes on after the update
LONGEST_BASELINE = 10.0
MOVE_TIMEOUT = 20.0


@dataclass
class Result:
    """What one case gave; in ms, and one entry for each update.

    `errors` is by how much a pause may be off, because the observer does not look all the time;
    `baselines` the longest gap without an update, in a window of the same length before it;
    `populating`, with prealloc, the longest gap in the time after that in which RAM came into the
    page tables again;
    `phases` and `reported` are the VMM's own report: of where the time went, and of how long the
    guest stood still.  `skipped` is why the case could not be run.
    """

    case: Case
    pauses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)
    populating: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    reported: list[float] = field(default_factory=list)
    realtime: bool = True
    skipped: str = ""

    @property
    def median(self) -> float:
        return median(self.pauses)

    @property
    def p99(self) -> float:
        return percentile(self.pauses, 0.99)

    @property
    def baseline(self) -> float:
        return median(self.baselines)

    @property
    def cost(self) -> float:
        """What the update adds to the longest gap of an equally long window without one."""
        return self.median - self.baseline

    @property
    def baseline_p99(self) -> float:
        return percentile(self.baselines, 0.99)

    def phase_medians(self) -> dict[str, float]:
        """The median of each phase, over the updates that have it, in the order of one of them."""
        names = max(self.phases, key=len, default={})
        return {name: median(p[name] for p in self.phases if name in p) for name in names}

    def to_dict(self) -> dict[str, Any]:
        return self.case.to_dict() | {name: getattr(self, name) for name in self._names()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        return cls(Case.from_dict(values), **{n: values[n] for n in cls._names() if n in values})

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in cls.__dataclass_fields__ if name != "case"]


class Subject:
    """A VM under its observer, stopped between its turns.  Owned by `stack`."""

    def __init__(self, result: Result, peer: Peer | None, poll_us: int, stack: ExitStack) -> None:
        self.case = case = result.case
        self.result = result
        self._peer = peer
        huge_before = shmem_hugepages()
        self._vm = stack.enter_context(started(case, peer))
        self._observer = stack.enter_context(Observer(self._vm.ram_path(), poll_us=poll_us))
        self.result.realtime = self._observer.realtime
        if case.pages == "THP" and shmem_hugepages() == huge_before:
            raise RuntimeError("the kernel gave the RAM no transparent huge pages")
        choose_mode(self._vm, case)
        self._length = 2 * SETTLE
        self._vm.qmp.command("stop")
        self._observer.rest()

    def turn(self) -> None:
        """One window without an update, one with, and one after it.  Raises one of FAILURES."""
        self._observer.look()
        self._vm.qmp.command("cont")
        baseline, pause, *populating = self._windows()
        self.result.pauses.append(pause.milliseconds)
        self.result.errors.append(pause.error_ns / 1e6)
        self.result.baselines.append(baseline.milliseconds)
        self.result.populating += [window.milliseconds for window in populating]
        self._read_report()
        self._vm.qmp.command("stop")
        self._observer.rest()

    def _windows(self) -> list[Window]:
        """What the observer sees before an update, over it and, with prealloc, after it."""
        keep_vcpus_off(self._vm, self._observer.cpu)
        wait_for_heartbeat(self._vm)
        windows = [self._observer.window_of(min(self._length, LONGEST_BASELINE))]
        begin = time.monotonic()
        update(self._vm, self.case, self._peer)
        wait_for_heartbeat(self._vm, MOVE_TIMEOUT)
        time.sleep(SETTLE)
        windows.append(self._observer.window())
        self._length = time.monotonic() - begin
        if self.case.backing == "prealloc":
            wait_until_populated(self._vm, self.case)
            windows.append(self._observer.window())
        if self._observer.backwards:
            raise RuntimeError("the guest's counter went back")
        return windows

    def _read_report(self) -> None:
        """What the new image says of the update; a QEMU says nothing."""
        answer = self._vm.qmp.command("query-migrate")
        if "x-cpr-phases" in answer:
            phases = {each["name"]: each["ns"] / 1e6 for each in answer["x-cpr-phases"]}
            self.result.phases.append(phases)
            self.result.reported.append(answer["x-cpr-downtime-ns"] / 1e6)


def measure(
    group: list[Case],
    updates: int,
    peer: Peer | None,
    progress: Progress = lambda text: None,
    poll_us: int = POLL_US,
) -> list[Result]:
    """Runs the cases of a group.  What cannot be run is left out, with the reason in the result."""
    results = {case: Result(case) for case in group}

    def start(case: Case, stack: ExitStack) -> Subject:
        return Subject(results[case], peer, poll_us, stack)

    for case, why in take_turns(group, start, updates, progress).items():
        results[case].skipped = why
    return list(results.values())
