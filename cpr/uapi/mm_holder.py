"""The mm holder: a child that shares this address space, so that exec does not tear it down.

Its PID goes to the new image in the environment, and the new image reaps it.
"""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError

PID_VARIABLE = "CPR_EXEC_MM_HOLDER"

_unreaped: list[int] = []  # holders of earlier images that are still freeing memory


class MmHolder:
    """A running holder.  Owns its release descriptor, close-on-exec: an exec releases it."""

    def __init__(self) -> None:
        """Raises KernelError where the child cannot be made, as under seccomp without clone."""
        fd = ffi.new("int *")
        pid = lib.cpr_mm_holder_start(fd)
        if pid < 0:
            raise KernelError("clone of the mm holder", -pid)
        self.pid: int = pid
        self._release_fd: int = fd[0]

    def announce(self) -> None:
        """Names the holder, and those still there, to the next image; `conceal` is the inverse."""
        os.environ[PID_VARIABLE] = " ".join(map(str, [self.pid, *_unreaped]))

    def conceal(self) -> None:
        os.environ.pop(PID_VARIABLE, None)

    def release(self) -> None:
        """Ends the holder and reaps it: for an update that does not happen."""
        self.conceal()
        os.close(self._release_fd)
        lib.cpr_mm_holder_reap(self.pid)


def reap_announced() -> None:
    """Waits for the holders that earlier images have named in the environment.

    They end when the old memory is freed, which may take longer than the next update.
    """
    _unreaped.extend(int(pid) for pid in os.environ.pop(PID_VARIABLE, "").split())
    while _unreaped:
        lib.cpr_mm_holder_reap(_unreaped[0])
        del _unreaped[0]
