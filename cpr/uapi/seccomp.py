"""-sandbox: the seccomp filters that QEMU's option of that name names."""

from __future__ import annotations

from cpr._native._cpr import lib
from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FILTERS = (
    ("spawn", lib.cpr_sandbox_spawn),
    ("resourcecontrol", lib.cpr_sandbox_resourcecontrol),
)


def apply(options: dict[str, Any]) -> None:
    """Applies -sandbox on[,obsolete=…][,elevateprivileges=…][,spawn=…][,resourcecontrol=…].

    The filters hold for all threads and over an exec; there is no inverse.  Raises KernelError.
    """
    steps = []
    if options.get("obsolete", "deny") != "allow":
        steps.append(lib.cpr_sandbox_obsolete)
    elevate = options.get("elevateprivileges", "allow")
    if elevate != "allow":  # "children" forbids programs that it starts, too; each filter does
        steps.append(lib.cpr_sandbox_elevate)
    steps += [function for name, function in _FILTERS if options.get(name, "allow") == "deny"]
    for step in steps:
        error = step()
        if error:
            raise KernelError(
                "-sandbox: seccomp", -error, "this kernel has no seccomp filters: use -sandbox off"
            )
