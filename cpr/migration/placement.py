"""On which CPUs an early update goes on: away from those that the guest's vCPUs run on.

The new image starts beside the running guest, and a start takes a CPU for tens of ms: on the same
CPU the vCPU would lose whole time slices.  So the thread that execs, which becomes the new image,
leaves the vCPUs' CPUs for as long as the update goes, where there are others that it may use.
"""

from __future__ import annotations

import os

from cpr.report import warn_report
from cpr.vcpus import Scheduling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from cpr.vcpus import VCpuThread

STATE_FIELD = 0  # of /proc/PID/stat after the name: 3 in proc_pid_stat(5), less three
PROCESSOR_FIELD = 36
RUNNING = "R"


class Placement:
    """The old VMM's side: where its main thread and its vCPUs may run, and where the rest goes."""

    def __init__(self, threads: Sequence[VCpuThread]) -> None:
        """Looks; the vCPU threads have not ended.  Raises OSError."""
        self._vcpus = [Scheduling.of(thread.thread_id) for thread in threads]
        self._own = os.sched_getaffinity(0)
        self._away = self._own - {_busy_cpu(thread.thread_id) for thread in threads}

    def keep_away(self) -> None:
        """Moves the caller's thread, and what it starts; the inverse is `give_back`."""
        if self._away:
            os.sched_setaffinity(0, self._away)

    def give_back(self) -> None:
        """The caller's thread may run where it might before the update."""
        restore(self._own)

    def describe(self) -> dict[str, Any]:
        """What the new VMM is to have, as plain data."""
        return {"main": sorted(self._own), "vcpus": [each.describe() for each in self._vcpus]}


def place_vcpus(threads: Sequence[VCpuThread], described: dict[str, Any]) -> None:
    """The new VMM's side: its vCPU threads are scheduled as the old one's were."""
    for thread, wanted in zip(threads, described["vcpus"], strict=True):
        try:
            Scheduling(*wanted).give(thread.thread_id)
        except OSError as error:
            warn_report(
                f"vCPU {thread.vcpu.index} is not scheduled as before the update: {error.strerror}"
            )


def restore(cpus: Iterable[int]) -> None:
    """The caller's thread may run on these, or, where none of them is left, on any."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        warn_report(f"the VMM is not on the CPUs from before the update: {error.strerror}")


def _busy_cpu(thread_id: int) -> int:
    """The CPU that a thread runs on, or -1 where it does not: its vCPU has halted."""
    with open(f"/proc/self/task/{thread_id}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[PROCESSOR_FIELD]) if fields[STATE_FIELD] == RUNNING else -1
