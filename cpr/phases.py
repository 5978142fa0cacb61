"""When each phase of an update began, for query-migrate; CLOCK_MONOTONIC in ns."""

from __future__ import annotations

import time

from cpr.faults import point

NAMES = (
    "prepare",  # asked for; the old image gets ready
    "exec",  # clone and execve, the interpreter, imports
    "config",  # the new image reads its command line and the CPR state
    "map",  # VM, RAM and memslots are made
    "vcpu",  # irqchip, vCPUs and devices are made
    "populate",  # RAM is mapped, before the guest is there (early update)
    "ready",  # all is there but the guest (early update)
    "stop",  # the guest stands still; it is saved
    "save",  # device state is written
    "load",  # the migration stream is read and applied
    "resume",  # vCPUs are let go
    "run",  # the guest runs: the end
)
times: dict[str, int] = {}
"""CLOCK_MONOTONIC in ns at which each phase began in this image."""


def mark(name: str) -> None:
    """The phase `name` begins now.

    The first mark of a name counts.  Each is a fault point of this name.
    """
    times.setdefault(name, time.monotonic_ns())
    point(name)
