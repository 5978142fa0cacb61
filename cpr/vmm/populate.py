"""prealloc=on for a guest that runs already: its RAM is populated little by little.

After an update the guest runs first.  Each step holds the mmap lock, which the guest's own page
faults need, so that steps are small, there is a pause of the same length after each, and none is
taken in the first moments, when the rest of the program starts.
"""

from __future__ import annotations

import os
import time
from _thread import allocate_lock, get_native_id, start_new_thread

from cpr import ram, report
from cpr.constants import NS_PER_S
from cpr.errors import CprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.ram import RAMBlock

START_DELAY = 0.25  # s
LEAST_REST = 0.0005  # s
BUDGET_NS = 10 * NS_PER_S
STEP = 0.0002  # s


class Populator:
    """A thread that populates those of `blocks` that ask for it; `close` ends it.

    How far it is, is in each block's `populated`.
    """

    def __init__(self, blocks: Sequence[RAMBlock], delay: float = START_DELAY) -> None:
        self._blocks = [b for b in blocks if b.prealloc and b.populated < b.size]
        self._delay = delay
        self._closing = allocate_lock()
        self._closing.acquire()
        self._ended = allocate_lock()
        if self._blocks:
            self._ended.acquire()
            start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            # This thread only: it must not take a vCPU's CPU for a time slice.
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            if not self._rest(self._delay):
                self._populate()
        except CprError as error:
            report.warn_report(error)
        finally:
            self._ended.release()

    def _populate(self) -> None:
        for block in self._blocks:
            began = time.monotonic_ns()
            while ram.populate_chunk(block):
                took = (time.monotonic_ns() - began) / NS_PER_S
                if self._rest(max(took, LEAST_REST)):
                    return
                began = time.monotonic_ns()

    def _rest(self, seconds: float) -> bool:
        """Waits so long; true where it is being closed."""
        if self._closing.acquire(timeout=seconds):
            self._closing.release()
            return True
        return False

    def close(self) -> None:
        """Ends the thread and waits for that; what is populated stays so.  Call it once."""
        self._closing.release()
        self._ended.acquire()


def populate_before(blocks: Sequence[RAMBlock], apart: bool, budget_ns: int = BUDGET_NS) -> None:
    """Maps what there is of the guest's RAM, before this process has the guest.

    All of a block that asks for prealloc, and of others what the guest has touched, so that it
    meets no page faults after the hand-over; no longer than the budget.  A thread of its own does
    it, which takes no time slice from the vCPUs: where they do not run `apart`, on CPUs that the
    caller's thread does not use, it waits until nobody else wants its CPU.
    """
    done = allocate_lock()
    done.acquire()
    deadline = time.monotonic_ns() + budget_ns
    thread_id = 0

    def run() -> None:
        nonlocal thread_id
        thread_id = get_native_id()
        try:
            if not apart:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            for block in blocks:
                while block.prealloc and time.monotonic_ns() < deadline:
                    if not ram.populate_chunk(block):
                        break
                for start, end in () if block.prealloc else ram.touched(block):
                    for at in range(start, end, ram.POPULATE_CHUNK):
                        if time.monotonic_ns() > deadline:
                            return
                        ram.populate_range(block, at, min(ram.POPULATE_CHUNK, end - at))
        except (CprError, OSError) as error:
            report.warn_report(error)
        finally:
            done.release()

    start_new_thread(run, ())
    done.acquire()
    # Its end takes locks that the hand-over needs, and it comes after all others on its CPU.
    while os.path.exists(f"/proc/self/task/{thread_id}"):
        time.sleep(STEP)
