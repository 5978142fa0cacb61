"""Room for what a VM needs to go on after an exec that did not succeed."""

from __future__ import annotations

from cpr.constants import MIB

OWN = 4 * MIB  # an arena of the interpreter's is 1 MiB (Objects/obmalloc.c), malloc's heap grows
PER_THREAD = MIB // 4  # a thread's frames are in chunks of 16 KiB (Python/pystate.c)


class Reserve:
    """Address space of this process, of which nothing is populated.

    The VM's threads end for an exec and start again where that fails.  A thread that has no memory
    for its first frame ends without a word, and the guest would wait for its vCPU for ever.
    """

    def __init__(self, threads: int) -> None:
        """For so many threads.  Raises MemoryError where there is no room (RLIMIT_AS, _DATA)."""
        import mmap  # not in the new image, whose guest may wait

        try:
            self._mapping = mmap.mmap(-1, OWN + threads * PER_THREAD)
        except OSError:
            raise MemoryError from None

    def close(self) -> None:
        """Gives the room to whatever needs it now."""
        self._mapping.close()
