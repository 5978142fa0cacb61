"""What the kernel and the C library do with this process."""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError


def end_with_parent(signo: int = signal.SIGTERM) -> None:
    """That signal where the parent's thread that has started this process ends, over an exec of
    either too.  Raises KernelError.
    """
    if lib.prctl(lib.PR_SET_PDEATHSIG, ffi.cast("unsigned long", signo)) < 0:
        raise KernelError("prctl(PR_SET_PDEATHSIG)", ffi.errno)


def keep_libraries() -> None:
    """Loads what glibc would look for when a thread ends, in a root that may not have it."""
    try:
        _kept.append(ffi.dlopen("libgcc_s.so.1"))
    except OSError:
        pass  # of a C library that needs none


_kept: list[object] = []
