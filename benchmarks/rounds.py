"""How cases are compared: their VMs take turns, round by round.

As many VMs of a group as fit into memory are up at the same time, those whose turn it is not are
stopped, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from benchmarks.cases import Case, available_memory, batches, obstacle
from benchmarks.machines import FAILURES, choose_mode, reason, started
from benchmarks.peer import Peer
from benchmarks.settings import Settings

MEMORY_SHARE = 0.85  # of the memory that can be had, for the VMs that are up at the same time
Progress = Callable[[str], None]


class Subject(Protocol):
    """A VM that is measured: stopped before and after its turn, which raises one of FAILURES."""

    def turn(self) -> None: ...


def take_turns(
    group: list[Case],
    start: Callable[[Case, ExitStack], Subject],
    rounds: int,
    progress: Progress,
    touched: bool = False,
) -> dict[Case, str]:
    """Starts each case of a group, which have the same pages, and gives it `rounds` turns.

    What `start` opens belongs to the stack that it is given.  `touched` says that the guests touch
    all their RAM.  Returns why cases were left out.
    """
    refused: dict[Case, str] = {}
    for case in group:
        if text := obstacle(case, touched):
            refused[case] = text
    possible = [case for case in group if case not in refused]
    memory = int(available_memory() * MEMORY_SHARE)
    for batch in batches(possible, memory, touched):
        refused |= _run_batch(batch, start, rounds, progress)
    return refused


def _run_batch(
    batch: list[Case],
    start: Callable[[Case, ExitStack], Subject],
    rounds: int,
    progress: Progress,
) -> dict[Case, str]:
    subjects: dict[Case, Subject] = {}
    refused: dict[Case, str] = {}
    with Settings() as settings, ExitStack() as stack:
        try:
            settings.prepare(batch[0].pages, [case.ram for case in batch])
        except RuntimeError as error:
            return dict.fromkeys(batch, reason(error))
        for case in batch:
            progress(f"{case.label}: starts")
            try:
                subjects[case] = start(case, stack)
            except FAILURES as error:
                refused[case] = reason(error)
        for number in range(1, rounds + 1):
            for case, subject in list(subjects.items()):
                progress(f"{case.label}: {number}/{rounds}")
                try:
                    subject.turn()
                except FAILURES as error:
                    refused[case] = f"update {number}: {reason(error)}"
                    del subjects[case]
    return refused


class Timed:
    """A Subject whose turn adds what it measured to `rounds`; for its VM's guest see `guest`.

    `touches` says that the guest touches all its RAM.
    """

    guest = "heartbeat"
    touches = False

    def __init__(
        self, case: Case, peer: Peer | None, rounds: list[dict[str, float]], stack: ExitStack
    ) -> None:
        self.case = case
        self.peer = peer
        self.rounds = rounds
        self.vm = stack.enter_context(started(case, peer, self.guest))
        choose_mode(self.vm, case)
        self.begin(stack)
        self.vm.qmp.command("stop")

    def begin(self, stack: ExitStack) -> None:
        """What is to be done once, with the guest running."""

    def turn(self) -> None:
        raise NotImplementedError


def measure(
    group: list[Case], subject: type[Timed], rounds: int, peer: Peer | None, progress: Progress
) -> list[dict[str, Any]]:
    """One entry for each case, with its `rounds`."""
    entries = {case: case.to_dict() | {"rounds": [], "skipped": ""} for case in group}

    def start(case: Case, stack: ExitStack) -> Timed:
        return subject(case, peer, entries[case]["rounds"], stack)

    for case, why in take_turns(group, start, rounds, progress, subject.touches).items():
        entries[case]["skipped"] = why
    return list(entries.values())


def left_out(entry: dict[str, Any]) -> str:
    """Why an entry has no figures, in one line; "" where it has."""
    skipped = entry["skipped"]
    return f"{Case.from_dict(entry).label}: left out: {skipped}" if skipped else ""
