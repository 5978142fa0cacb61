"""-sandbox: the seccomp filter that QEMU's option of that name describes."""

from __future__ import annotations

import errno
import os

from cpr._native._cpr import lib
from cpr.constants import SECCOMP_FILTER
from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Key of -sandbox: the group of system calls, and what it is by default.
_GROUPS = {
    "obsolete": (lib.CPR_SANDBOX_OBSOLETE, "deny"),
    "elevateprivileges": (lib.CPR_SANDBOX_ELEVATEPRIVILEGES, "allow"),
    "spawn": (lib.CPR_SANDBOX_SPAWN, "allow"),
    "resourcecontrol": (lib.CPR_SANDBOX_RESOURCECONTROL, "allow"),
}


IN_FORCE = "CPR_SANDBOX"
"""The variable with the groups whose filter this process has already, in hexadecimal."""


def apply(options: dict[str, Any], after_exec: bool) -> None:
    """Applies -sandbox on[,obsolete=…][,elevateprivileges=…][,spawn=…][,resourcecontrol=…].

    The filter holds for all threads and over an exec, after which it is not attached again: the
    kernel takes some hundreds for a process.  There is no inverse.  Raises KernelError.
    """
    groups = lib.CPR_SANDBOX_DEFAULT
    for name, (group, default) in _GROUPS.items():
        if options.get(name, default) != "allow":  # "children": a filter is for programs, too
            groups |= group
    before = _in_force() if after_exec else 0
    if groups & ~before:
        error = lib.cpr_sandbox(groups)
        if error:
            remedy = "this kernel has no seccomp filters: use -sandbox off"
            if error == -errno.ENOMEM:
                remedy = "this process has as many filters as the kernel takes: start it anew"
            raise KernelError("-sandbox: seccomp", -error, remedy)
    os.environ[IN_FORCE] = f"{groups | before:x}"


def _in_force() -> int:
    try:
        with open("/proc/self/status") as file:
            return int(os.environ.get(IN_FORCE, "0"), 16) if SECCOMP_FILTER in file.read() else 0
    except (OSError, ValueError):
        return 0
