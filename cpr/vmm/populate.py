"""prealloc=on behind a guest that runs already: its RAM is populated little by little.

After an update the guest runs first.  Each step holds the mmap lock, which the guest's own page
faults need, so that steps are small, there is a pause of the same length after each, and none is
taken in the first moments, when the rest of the program starts.
"""

from __future__ import annotations

import os
import time
from _thread import allocate_lock, start_new_thread

from cpr import ram, report
from cpr.errors import CprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.ram import RAMBlock

NS_PER_S = 1_000_000_000
START_DELAY = 0.25  # s
LEAST_REST = 0.0005  # s


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
