"""Where a thread may run, and how exactly its timeouts are kept."""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

WORD = 64  # bits of a word of a kernel's CPU mask on x86-64


def cpu_mask(cpus: Iterable[int]) -> bytes:
    """CPUs as the kernel takes them (sched_setaffinity(2))."""
    mask = sum(1 << cpu for cpu in set(cpus))
    words = (mask.bit_length() + WORD - 1) // WORD or 1
    return mask.to_bytes(words * WORD // 8, "little")


def set_affinity(thread_id: int, cpus: Iterable[int]) -> None:
    """As os.sched_setaffinity, without the interpreter's lock: a move waits for a CPU to be free.

    vCPUs whose accesses devices answer would wait with it.  `thread_id` is 0 for the caller's.
    Raises OSError.
    """
    data = cpu_mask(cpus)
    if lib.sched_setaffinity(thread_id, len(data), ffi.cast("cpu_set_t *", ffi.from_buffer(data))):
        raise OSError(ffi.errno, os.strerror(ffi.errno))


def set_timer_slack(ns: int) -> None:
    """By how much timeouts of the caller's thread may be late (prctl(2)); 0 for the default."""
    lib.prctl(lib.PR_SET_TIMERSLACK, ffi.cast("unsigned long", ns))
