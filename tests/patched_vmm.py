"""The VMM with one step changed, for what no input brings: `patched_vmm.py WHAT run …`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpr import mapped
from cpr.chardev import socket as socket_chardev
from cpr.devices import base
from cpr.errors import KernelError
from cpr.lifecycle import Lifecycle
from cpr.live import old_image
from cpr.migration.outgoing import Outgoing
from cpr.monitor.qmp import QmpMonitor

load_boot_image = Lifecycle.load_boot_image
stop_guest = Outgoing.stop_guest
connect = socket_chardev.connect
save_monitor = QmpMonitor.save


def no_memory(*arguments: object) -> None:
    raise KernelError("a step of the test", 12)


def no_room(*arguments: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def not_permitted(*arguments: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def forgets(monitor: QmpMonitor) -> dict[str, object]:
    """As a version would that knows less of a monitor."""
    return {key: value for key, value in save_monitor(monitor).items() if key != "last-event"}


def powers_off(outgoing: Outgoing) -> None:
    outgoing.machine.request_shutdown(True, "guest-shutdown")
    stop_guest(outgoing)


def exits(outgoing: Outgoing) -> None:
    outgoing.machine.request_exit(7)
    stop_guest(outgoing)


def sleeps(outgoing: Outgoing) -> None:
    outgoing.machine.request_suspend()
    stop_guest(outgoing)


def third_time(machine: Lifecycle, calls: list[int] = []) -> None:  # noqa: B006
    """Loads the boot image when the VM is powered on, not at its first reset, and again then."""
    calls.append(1)
    if len(calls) == 2:
        raise MemoryError
    load_boot_image(machine)


def second_time(*arguments: object, calls: list[int] = []) -> object:  # noqa: B006
    """Connects when the VM is started, and not again."""
    calls.append(1)
    if len(calls) == 2:
        raise OSError(24, "Too many open files")
    return connect(*arguments)


PATCHES = {
    "rollback": (base.Device, "cpr_rollback", no_memory),
    "connect": (socket_chardev, "connect", second_time),
    "memfd": (mapped, "populate", no_room),
    "kill": (old_image.signal, "pidfd_send_signal", not_permitted),
    "forgets": (QmpMonitor, "save", forgets),
    "power-off": (Outgoing, "stop_guest", powers_off),
    "exit": (Outgoing, "stop_guest", exits),
    "sleep": (Outgoing, "stop_guest", sleeps),
    "reset": (Lifecycle, "load_boot_image", third_time),
}

if __name__ == "__main__":
    owner, name, function = PATCHES[sys.argv.pop(1)]
    setattr(owner, name, function)
    sys.argv[0] = "cpr.vmm"
    runpy.run_module("cpr.vmm", run_name="__main__", alter_sys=True)
