"""When each phase of an update began, for a benchmark; off unless CPR_PHASES names a file.

The file must exist, best on a tmpfs.  It holds a little-endian u64 for each of NAMES: the
CLOCK_MONOTONIC time in ns at which that phase began, 0 if it has not.  Old and new image write to
the same file; whoever reads it clears it before the update, and knows `interpreter`, the end of the
exec, from the closing of a close-on-exec descriptor.
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
    "load",  # the migration stream is read and applied
    "resume",  # vCPUs are let go
    "run",  # the guest runs: the end
)
SLOT_SIZE = 8
FILE_SIZE = SLOT_SIZE * len(NAMES)


def mark(name: str) -> None:
    """The phase `name` begins now.  Does nothing where CPR_PHASES is not set.

    In one image the first mark of a name counts, until `stop` begins another update.
    """


def _write(name: str) -> None:
    now = time.monotonic_ns().to_bytes(SLOT_SIZE, "little")
    if name == NAMES[0]:
        _marked.clear()
    if name not in _marked:
        _marked.add(name)
        posix.pwrite(_fd, now, NAMES.index(name) * SLOT_SIZE)


_marked: set[str] = set()


if _path := posix.environ.get(b"CPR_PHASES"):
    try:
        _fd = posix.open(_path, posix.O_WRONLY | posix.O_CLOEXEC)
        mark = _write
    except OSError:  # no benchmark is worth a guest
        pass
