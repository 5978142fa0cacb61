"""The mm holder: a child that shares this address space, so that exec does not tear it down.

Its PID goes to the new image in the environment, and the new image reaps it.
"""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError

PID_VARIABLE = "CPR_EXEC_MM_HOLDER"


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
        """Names the holder to the image that is exec'd next; `conceal` is the inverse."""
        os.environ[PID_VARIABLE] = str(self.pid)

    def conceal(self) -> None:
        os.environ.pop(PID_VARIABLE, None)

    def release(self) -> None:
        """Ends the holder and reaps it: for an update that does not happen."""
        self.conceal()
        os.close(self._release_fd)
        lib.cpr_mm_holder_reap(self.pid)


def take_announced() -> int:
    """The PID of the holder that the image before this one named in the environment, or 0."""
    value = os.environ.pop(PID_VARIABLE, "")
    return int(value) if value.isdecimal() else 0


def reap(pid: int) -> None:
    """Waits for a holder of the image before this one; it ends when the old memory is freed."""
    lib.cpr_mm_holder_reap(pid)
