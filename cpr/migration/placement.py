"""On which CPUs an early update goes on: away from those that the guest's vCPUs run on.

The new image starts beside the running guest, and a start takes a CPU for tens of ms: on the same
CPU the vCPU would lose whole time slices.  So the thread that execs, which becomes the new image,
leaves the vCPUs' CPUs for as long as the guest runs, where there are others that it may use.  When
the guest is stopped for the hand-over its CPUs are free, and do nothing else: both images go there.
"""

from __future__ import annotations

import os
import time

from cpr.live.token import PROCESSOR_FIELD, STATE_FIELD, read_stat, tasks, workers
from cpr.report import warn_report
from cpr.uapi.affinity import set_affinity
from cpr.vcpus import Scheduling, schedstat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cpr.vcpus import VCpuThread

RUNNING = "R"
LOOK = 0.002  # s
BUSY_NS = 200_000
"""A vCPU that has run for so long while it was looked at is no halted one."""


class Placement:
    """Where the main thread and the vCPU threads of both images may run."""

    def __init__(
        self,
        own: Iterable[int],
        away: Iterable[int],
        vcpus: Sequence[list],
        nice: Sequence[int | None] = (),
    ) -> None:
        """CPUs that a main thread may use, those of them that no vCPU runs on, and how each vCPU
        thread is scheduled: what `describe` and `nice` give.  An older program has no `nice`."""
        self._own = set(own)
        self._away = set(away)
        values = nice or [None] * len(vcpus)
        self._vcpus = [
            Scheduling(cpus, policy, priority, value)
            for (cpus, policy, priority), value in zip(vcpus, values, strict=True)
        ]

    @classmethod
    def of(cls, threads: Sequence[VCpuThread]) -> Placement:
        """The old VMM's, whose vCPU threads have not ended.  Raises OSError."""
        own = os.sched_getaffinity(0)
        before = [schedstat(thread.thread_id)[0] for thread in threads]
        time.sleep(LOOK)  # a vCPU that uses devices runs only while this thread does not
        away = own - {
            _busy_cpu(thread.thread_id, ran) for thread, ran in zip(threads, before, strict=True)
        }
        vcpus = [Scheduling.of(thread.thread_id) for thread in threads]
        return cls(own, away, [each.describe() for each in vcpus], [each.nice for each in vcpus])

    @property
    def nice(self) -> list[int | None]:
        """The nice values of the vCPU threads, None for any."""
        return [each.nice for each in self._vcpus]

    def describe(self) -> list:
        """The other arguments of the constructor, as plain data: an older program takes these."""
        return [sorted(self._own), sorted(self._away), [each.describe() for each in self._vcpus]]

    @property
    def guest_cpus(self) -> set[int]:
        """Those that vCPUs run on; empty where there are no others."""
        return self._own - self._away if self._away else set()

    def keep_away(self) -> None:
        """Moves the caller's thread, and what it starts; the inverse is `give_back`."""
        _move(self._away)

    def bring(self, new_image: int) -> None:
        """Moves the main thread of the new image, which waits, to the CPUs of the guest."""
        _move(self.guest_cpus, new_image)

    def hand_over(self) -> None:
        """Moves the caller's thread to the CPUs of the guest, which runs until it has its turn.

        It stays where it would have none.
        """
        if all(each.gives_way for each in self._vcpus):
            _move(self.guest_cpus)

    def give_back(self, threads: Sequence[VCpuThread]) -> None:
        """The caller's thread, and those that it has started meanwhile, may run where the main
        thread might before the update; `threads`, the vCPUs', are where they were.  Raises nothing.
        """
        _move(self._own)
        vcpus = {str(thread.thread_id) for thread in threads}
        try:
            others = tasks() - workers() - vcpus
        except OSError:  # no descriptor is left
            return
        _spread(others, self._own)

    def place(self, threads: Sequence[VCpuThread]) -> None:
        """Has vCPU threads scheduled as the old VMM's were, on the CPUs of the guest alone.

        Where one wakes up on another CPU it shares that with both images.  `release` lets them go.
        Beside a vCPU that does not give way it would not even come to its rest, and would hold the
        interpreter meanwhile: such a one is scheduled when it runs.
        """
        for thread, wanted in zip(threads, self._vcpus, strict=True):
            if wanted.gives_way:
                thread.schedule(wanted.within(self.guest_cpus))

    def release(self, threads: Sequence[VCpuThread]) -> None:
        """Has vCPU threads scheduled as the old VMM's were, and what KVM has started for them."""
        for thread, wanted in zip(threads, self._vcpus, strict=True):
            thread.schedule(wanted)
        try:
            started = workers() if self._away else ()
        except OSError:  # no descriptor is left
            return
        for task in started:
            try:
                cpus = os.sched_getaffinity(int(task))
            except OSError:  # it has ended meanwhile
                continue
            if cpus == self._away:  # a main thread has started it, see `keep_away`
                _spread([task], self._own)
            elif cpus <= self.guest_cpus and threads:
                _spread([task], os.sched_getaffinity(threads[0].thread_id))


def _spread(numbers: Iterable[str], cpus: set[int]) -> None:
    """Lets threads run on those CPUs, as far as they can be moved."""
    for task in numbers:
        try:
            set_affinity(int(task), cpus)
        except OSError:  # it has ended meanwhile, or is not to be moved
            pass


def _move(cpus: set[int], thread_id: int = 0) -> None:
    """Leaves the thread, 0 for the caller's, where it is if there is no CPU to go to."""
    if not cpus:
        return
    try:
        set_affinity(thread_id, cpus)
    except PermissionError:
        pass  # -sandbox resourcecontrol=deny wants it so
    except OSError as error:
        warn_report(f"the VMM cannot run on the CPUs {sorted(cpus)}: {error.strerror}")


def _busy_cpu(thread_id: int, ran_ns: int) -> int:
    """The CPU of a thread that had run for `ran_ns`, or -1 where it does not run: it has halted.

    The time of one that runs all the while is counted at the next tick only.
    """
    fields = read_stat(f"/proc/self/task/{thread_id}/stat")[1]
    busy = fields[STATE_FIELD] == RUNNING or schedstat(thread_id)[0] - ran_ns > BUSY_NS
    return int(fields[PROCESSOR_FIELD]) if busy else -1
