"""What a VMM may need later is imported at its start.

The files of the package may be those of another version an hour later, by an upgrade in place, or
be gone; an update, its failure and a rehearsal must not read them any more.
"""

from __future__ import annotations

import gc
from importlib import import_module

MODULES = (
    "cpr.accel.kvm.cpuid_names",
    "cpr.accel.paging",
    "cpr.chardev.address",
    "cpr.chardev.base",
    "cpr.chardev.file",
    "cpr.chardev.null",
    "cpr.chardev.pty",
    "cpr.chardev.socket",
    "cpr.chardev.stdio",
    "cpr.config.option_json",
    "cpr.config.readconfig",
    "cpr.config.usage",
    "cpr.linux_boot",
    "cpr.live.messages",
    "cpr.live.notify",
    "cpr.migration.child",
    "cpr.migration.connect",
    "cpr.migration.connections",
    "cpr.migration.cpr_exec",
    "cpr.migration.cpr_transfer",
    "cpr.migration.early",
    "cpr.migration.listener",
    "cpr.migration.outgoing",
    "cpr.migration.rehearsal",
    "cpr.migration.staging",
    "cpr.migration.text",
    "cpr.monitor.hmp",
    "cpr.monitor.introspect",
    "cpr.monitor.qmp",
    "cpr.pages",
    "cpr.process_group",
    "cpr.vmm.connections",
    "cpr.vmm.populate",
    "mmap",  # a shared library, for which there may be no memory later
)
"""All that is imported in a function.

In an early update that is also what the new image's chardevs and monitors need: an import holds the
interpreter for ms, in which a vCPU that exits to a device would wait.
"""


def preload() -> None:
    """Imports them; what there is then stays, and the garbage collector looks at it no more.

    Raises ImportError, or what else a module that is broken raises; all others are there then.
    A vCPU that exits to a device would wait for that, for ms.  A guest that stands still for a late
    update waits for none of this: it comes after it runs.
    """
    problem = None
    for name in MODULES:
        try:
            import_module(name)
        except Exception as error:
            problem = problem or error
    gc.freeze()
    if problem is not None:
        raise problem
