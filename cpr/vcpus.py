"""vCPU threads: started parked, let go by `resume`, parked again by `pause`.

The hand-over uses plain locks as binary semaphores, because they cost nothing at start-up.
"""

from __future__ import annotations

import os
import time
from _thread import allocate_lock, get_ident, get_native_id, start_new_thread

from cpr.accel import base
from cpr.errors import CprError
from cpr.report import carefully, unexpected, warn_report
from cpr.uapi.affinity import set_affinity, set_timer_slack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from cpr.accel.base import Bus, VCpu


VCPUS_FIRST = 100e-6
"""How long, in s, who lets vCPUs go leaves CPU and interpreter to their threads."""
RETRY = 0.01  # s, until a thread can be started that the guest cannot go on without
YIELDING = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)
VCPU_SLACK_NS = 1
"""A vCPU waits for the interpreter's lock with a timeout, which the default 50 us would double."""


class Scheduling:
    """How a thread is scheduled, which a management program may have set from outside."""

    __slots__ = ("_cpus", "_nice", "_policy", "_priority")

    def __init__(
        self, cpus: Iterable[int], policy: int, priority: int, nice: int | None = None
    ) -> None:
        """The CPUs it may run on, the policy SCHED_* with its priority, and the nice value; None
        for any."""
        self._cpus = set(cpus)
        self._policy = policy
        self._priority = priority
        self._nice = nice

    @classmethod
    def of(cls, thread_id: int) -> Scheduling:
        """That of a thread.  Raises OSError where it has ended."""
        return cls(
            os.sched_getaffinity(thread_id),
            os.sched_getscheduler(thread_id),
            os.sched_getparam(thread_id).sched_priority,
            os.getpriority(os.PRIO_PROCESS, thread_id),
        )

    def describe(self) -> list:
        """The arguments of the constructor, as plain data, but for the nice value."""
        return [sorted(self._cpus), self._policy, self._priority]

    @property
    def nice(self) -> int | None:
        return self._nice

    @property
    def gives_way(self) -> bool:
        """Whether the caller's thread gets its turn on a CPU that such a thread does not leave."""
        if self._policy not in YIELDING:
            return False
        return self._nice is None or self._nice >= os.getpriority(os.PRIO_PROCESS, 0)

    def within(self, cpus: set[int]) -> Scheduling:
        """The same on those CPUs alone, if it may run on any of them."""
        within = self._cpus & cpus or self._cpus
        return Scheduling(within, self._policy, self._priority, self._nice)

    def give(self, thread_id: int) -> None:
        """Has another thread scheduled so, where it is not.  Raises OSError."""
        if os.sched_getaffinity(thread_id) != self._cpus:
            set_affinity(thread_id, self._cpus)
        if os.sched_getscheduler(thread_id) != self._policy:
            os.sched_setscheduler(thread_id, self._policy, os.sched_param(self._priority))
        nice = self._nice
        if nice is not None and os.getpriority(os.PRIO_PROCESS, thread_id) != nice:
            os.setpriority(os.PRIO_PROCESS, thread_id, nice)


def schedstat(thread_id: int) -> tuple[int, int]:
    """ns that a thread has run, and has waited for a CPU (Documentation/scheduler/sched-stats.rst);
    0 where nobody counts."""
    try:
        with open(f"/proc/self/task/{thread_id}/schedstat") as file:
            ran, waited = file.read().split()[:2]
    except FileNotFoundError:
        return 0, 0
    return int(ran), int(waited)


class VCpuThread:
    """The thread that runs one vCPU.

    `on_guest_reset(reason)` and `on_error(error)` are called on it when the vCPU cannot go on by
    itself; the thread then waits to be paused.
    """

    def __init__(
        self,
        vcpu: VCpu,
        bus: Bus,
        on_guest_reset: Callable[[], None],
        on_error: Callable[[CprError], None],
    ) -> None:
        self.vcpu = vcpu
        self._thread_id = 0
        self._scheduling: Scheduling | None = None
        self._bus = bus
        self._on_guest_reset = on_guest_reset
        self._on_error = on_error
        self._stopping = True
        self._ending = True  # there is no thread yet
        self._running = False
        self._work: list[tuple[Callable[[VCpu], Any], list, Any]] = []
        self._work_lock = allocate_lock()
        self._takes_work = False
        self._ended = allocate_lock()
        self.waited_ns = 0
        """How long the thread that has ended had waited for a CPU."""
        self.start()

    def start(self, gives_up: Callable[[], bool] = lambda: True) -> None:
        """Starts the thread, paused; the inverse of `end`.

        After an `end` it is on the CPUs, and has the policy, that it had before.  Raises
        RuntimeError where no thread can be started and `gives_up()` says not to wait until one can.
        """
        self._ended.acquire()  # there is never a second thread of one vCPU
        self._go = _semaphore()
        self._parked = _semaphore()
        self._woken = _semaphore()
        self._started = _semaphore()
        self._thread_id = 0
        while True:
            try:
                self._ident = start_new_thread(self._main, ())
                break
            except RuntimeError:  # RLIMIT_NPROC
                if gives_up():
                    self._ended.release()
                    raise
                time.sleep(RETRY)
        self._ending = False

    @property
    def thread_id(self) -> int:
        """The kernel's; waits for a thread that has just been started.  0 where there is none."""
        if not self._thread_id and not self._ending:
            with self._started:
                pass
        return self._thread_id

    def schedule(self, scheduling: Scheduling) -> None:
        """Has the thread scheduled as one before it was; a warning where that is refused."""
        try:
            scheduling.give(self.thread_id)
        except OSError as error:
            warn_report(f"vCPU {self.vcpu.index} is not scheduled as before: {error.strerror}")

    @property
    def running(self) -> bool:
        """Whether the vCPU was let go by `resume`."""
        return self._running

    @property
    def has_ended(self) -> bool:
        """Whether there is no thread any more, by `end`."""
        return self._ending

    @property
    def is_current(self) -> bool:
        """True on this very thread."""
        return get_ident() == self._ident

    def resume(self) -> None:
        """Lets the vCPU run; the inverse of `pause`.  Nothing happens where there is no thread."""
        if not self._running and not self._ending:
            with self._work_lock:  # which has who looks at the vCPU meanwhile
                self._takes_work = True
            self._running = True
            self._stopping = False
            self._go.release()

    def request_pause(self) -> None:
        """The first half of `pause`, so that all vCPUs can be asked before any is waited for."""
        if self._running and not self._stopping:
            self._stopping = True
            self._kick()

    def withdraw_pause(self) -> None:
        """The inverse of `request_pause` where no `pause` has come."""
        if self._running and self._stopping:
            self.pause()
            self.resume()

    def pause(self) -> None:
        """Stops the vCPU and waits until it is out of guest mode and its state is readable."""
        self.request_pause()
        if self._running:
            self._parked.acquire()
            self._running = False

    def run_on(self, function: Callable[[VCpu], Any]) -> Any:
        """Calls function(vcpu) while the vCPU is out of guest mode, and returns its result.

        On any thread, whoever pauses and resumes the vCPU meanwhile.
        """
        done = _semaphore()
        result: list = []
        with self._work_lock:
            if not self._takes_work:
                return function(self.vcpu)
            self._work.append((function, result, done))
        self._kick()
        done.acquire()
        if isinstance(result[0], CprError):
            raise result[0]
        return result[0]

    def end(self) -> None:
        """Pauses the vCPU and ends the thread, soon; the inverse of `start`.

        Nothing happens where there is none.
        """
        if self._ending:
            return
        self.pause()
        try:
            self._scheduling = Scheduling.of(self.thread_id)
            self.waited_ns = schedstat(self.thread_id)[1]
        except OSError:
            self._scheduling = None
            self.waited_ns = 0
        self._ending = True
        self._go.release()

    def _kick(self) -> None:
        self.vcpu.kick()
        if self._woken.locked():
            try:
                self._woken.release()
            except RuntimeError:  # another kick was faster
                pass

    def _main(self) -> None:
        self._thread_id = get_native_id()
        self._started.release()
        carefully(self._schedule_again)
        while True:
            self._go.acquire()
            if self._ending:
                self._ended.release()
                return
            while not self._stopping:
                self._run_once()
            self._do_work(last=True)
            self._parked.release()

    def _schedule_again(self) -> None:
        set_timer_slack(VCPU_SLACK_NS)
        if self._scheduling is not None:
            self.schedule(self._scheduling)

    def _run_once(self) -> None:
        try:
            reason = self.vcpu.run(self._bus)
        except CprError as error:
            self._on_error(error)
            reason = ""
        except Exception as error:  # a bug in a device must not leave the others without this vCPU
            self._on_error(CprError(f"vCPU {self.vcpu.index}: {unexpected(error)}"))
            reason = ""
        self._do_work()
        if reason in (base.SHUTDOWN, base.RESET):
            self._on_guest_reset()
        if reason != base.KICKED:
            while not self._stopping:
                self._woken.acquire()
                self._do_work()

    def _do_work(self, last: bool = False) -> None:
        with self._work_lock:
            self._takes_work = not last
            work, self._work = self._work, []
        for function, result, done in work:
            try:
                result.append(function(self.vcpu))
            except CprError as error:
                result.append(error)
            except Exception as error:
                result.append(CprError(f"vCPU {self.vcpu.index}: {error}"))
            done.release()


def _semaphore() -> Any:
    lock = allocate_lock()
    lock.acquire()
    return lock
