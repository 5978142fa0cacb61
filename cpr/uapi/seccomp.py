"""-sandbox: the seccomp filter that QEMU's option of that name describes."""

from __future__ import annotations

from cpr._native._cpr import lib
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


def apply(options: dict[str, Any]) -> None:
    """Applies -sandbox on[,obsolete=…][,elevateprivileges=…][,spawn=…][,resourcecontrol=…].

    The filter holds for all threads and over an exec; there is no inverse.  Raises KernelError.
    """
    groups = lib.CPR_SANDBOX_DEFAULT
    for name, (group, default) in _GROUPS.items():
        if options.get(name, default) != "allow":  # "children": a filter is for programs, too
            groups |= group
    error = lib.cpr_sandbox(groups)
    if error:
        raise KernelError(
            "-sandbox: seccomp", -error, "this kernel has no seccomp filters: use -sandbox off"
        )
