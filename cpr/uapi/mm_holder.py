"""The mm holder: a child that shares this address space, so that exec does not tear it down.

The new image finds it among its children, and reaps it when it has freed the old memory.
"""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class MmHolder:
    """A running holder.  Owns its release descriptor, close-on-exec: an exec releases it."""

    def __init__(self, mappings: list[tuple[int, int]]) -> None:
        """`mappings` are the address and bytes of what guest RAM is mapped at.

        Raises KernelError where the child cannot be made, as under seccomp without clone.
        """
        fd = ffi.new("int *")
        self._mappings = mapping_array(mappings)
        pid = lib.cpr_mm_holder_start(self._mappings, len(mappings), fd)
        if pid < 0:
            raise KernelError("clone of the mm holder", -pid)
        self._pid: int = pid
        self._release_fd: int = fd[0]

    def release(self) -> None:
        """Ends the holder and reaps it: for an update that does not happen."""
        lib.cpr_mm_holder_release(self._pid, self._release_fd)


def mapping_array(mappings: list[tuple[int, int]]) -> Any:
    """The same as an array of struct cpr_mapping, for a child that shares this memory."""
    return ffi.new("struct cpr_mapping[]", mappings)


def children() -> list[int]:
    """The PIDs of this process's children: right after an exec, those of the images before it."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: they stay zombies
        return []


def reap(pids: list[int]) -> None:
    """Waits for children that an image before this one has started."""
    for pid in pids:
        lib.cpr_mm_holder_reap(pid)
