"""How cases are compared: their VMs take turns, round by round.

As many VMs of a group as fit into memory are up at the same time, those whose turn it is not are
stopped, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from benchmarks.cases import Case, available_memory, batches, obstacle
from benchmarks.machines import FAILURES, reason
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
    left_out: dict[Case, str] = {}
    for case in group:
        if text := obstacle(case, touched):
            left_out[case] = text
    possible = [case for case in group if case not in left_out]
    memory = int(available_memory() * MEMORY_SHARE)
    for batch in batches(possible, memory, touched):
        left_out |= _run_batch(batch, start, rounds, progress)
    return left_out


def _run_batch(
    batch: list[Case],
    start: Callable[[Case, ExitStack], Subject],
    rounds: int,
    progress: Progress,
) -> dict[Case, str]:
    subjects: dict[Case, Subject] = {}
    left_out: dict[Case, str] = {}
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
                left_out[case] = reason(error)
        for number in range(1, rounds + 1):
            for case, subject in list(subjects.items()):
                progress(f"{case.label}: {number}/{rounds}")
                try:
                    subject.turn()
                except FAILURES as error:
                    left_out[case] = f"update {number}: {reason(error)}"
                    del subjects[case]
    return left_out
