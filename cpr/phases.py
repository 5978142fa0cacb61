"""When each phase of an update began: for query-migrate, and for a benchmark.

A benchmark names a file with CPR_PHASES.  It must exist, best on a tmpfs.  It holds a
little-endian u64 for each of NAMES: the CLOCK_MONOTONIC time in ns at which that phase began, 0 if
it has not.  Old and new image write to the same file; whoever reads it clears it before the update,
and knows `interpreter`, the end of the exec, from the closing of a close-on-exec descriptor.
"""

from __future__ import annotations

import posix
import time

NAMES = (
    "stop",  # vCPUs are asked to leave guest mode
    "save",  # device state is written
    "exec",  # execvp
    "interpreter",
    "imports",  # the first lines of the new image have run
    "config",  # its command line and the CPR state are read
    "map",  # VM, RAM and memslots are made
    "vcpu",  # irqchip, vCPUs and devices are made
    "populate",  # RAM is mapped, before the guest is there (early update)
    "ready",  # all is there but the guest (early update)
    "load",  # the migration stream is read and applied
    "resume",  # vCPUs are let go
    "run",  # the guest runs: the end
)
SLOT_SIZE = 8
FILE_SIZE = SLOT_SIZE * len(NAMES)


times: dict[str, int] = {}
"""CLOCK_MONOTONIC in ns at which each phase began in this image."""


def mark(name: str) -> None:
    """The phase `name` begins now.

    In one image the first mark of a name counts, until `stop` begins another update.
    """
    if name == NAMES[0]:
        times.clear()
    times.setdefault(name, time.monotonic_ns())


def _write(name: str) -> None:
    known = name in times and name != NAMES[0]
    _note(name)
    if not known:
        now = times[name].to_bytes(SLOT_SIZE, "little")
        posix.pwrite(_fd, now, NAMES.index(name) * SLOT_SIZE)


_note = mark

if _path := posix.environ.get(b"CPR_PHASES"):
    try:
        _fd = posix.open(_path, posix.O_WRONLY | posix.O_CLOEXEC)
        mark = _write
    except OSError:  # no benchmark is worth a guest
        pass
