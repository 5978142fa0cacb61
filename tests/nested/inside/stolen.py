"""A VMM's own descriptors, taken out of the process to look at the device behind its back."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from harness.vm import Vm

from cpr.uapi.fd import Fd

PIDFD_GETFD = 438  # the system call's number (asm-generic/unistd.h)


@contextmanager
def descriptor(vm: Vm, pattern: str) -> Iterator[Fd]:
    """A copy of the one descriptor of the VMM whose target in /proc matches the pattern."""
    found = [fd for fd, target in vm.descriptors().items() if re.search(pattern, target)]
    assert len(found) == 1, f"{pattern}: {vm.descriptors()}"
    pidfd = os.pidfd_open(vm.pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        number = libc.syscall(PIDFD_GETFD, pidfd, found[0], 0)
        if number < 0:
            raise OSError(ctypes.get_errno(), f"pidfd_getfd of {vm.descriptors()[found[0]]}")
    finally:
        os.close(pidfd)
    copy = Fd(number, pattern)
    try:
        yield copy
    finally:
        copy.close()
