"""What goes over an update of the chardevs, the monitors, and the descriptors passed to these.

An early update keeps all that has no cpr=off, a late one what has cpr=on; the descriptors go where
a monitor goes.  A chardev that is another one in the new VMM is opened anew there.
"""

from __future__ import annotations

from cpr.chardev.base import fits
from cpr.state.connections import Kept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.chardev.base import Chardev
    from cpr.config import Config
    from cpr.vmm.vmm import Vmm

CHARDEV, MONITOR, PASSED = "chardev:", "monitor:", "passed"


def save(vmm: Vmm, late: bool) -> dict[str, Kept]:
    """Of each connection that is kept; the descriptors stay the VMM's."""
    asked = {config.chardev: config.cpr for config in vmm.config.monitors}
    kept: dict[str, Kept] = {}
    for label, chardev in vmm.chardevs.items():
        cpr = chardev.cpr if chardev.cpr is not None else asked.get(label)
        if cpr or (cpr is None and not late):
            kept[f"{CHARDEV}{label}"] = chardev.save()
    for config, monitor in vmm.monitors:
        if f"{CHARDEV}{config.chardev}" in kept:
            kept[f"{MONITOR}{config.chardev}"] = Kept(monitor.save())
            kept[PASSED] = vmm.passed_fds.save()
    return kept


class Arrived:
    """What has come, and has a place in the new VMM: `chardevs` by id, and `passed`.

    All else is closed here.
    """

    def __init__(self, config: Config, kept: dict[str, Kept]) -> None:
        self._kept = kept
        modes = {monitor.chardev: monitor.mode for monitor in config.monitors}
        known = {chardev.id: chardev for chardev in config.chardevs}
        self.passed = kept.get(PASSED)
        self.chardevs: dict[str, Kept] = {}
        for name, connection in kept.items():
            if not name.startswith(CHARDEV):
                continue
            label = name.removeprefix(CHARDEV)
            monitor = kept.get(f"{MONITOR}{label}")
            was = monitor.data["mode"] if monitor is not None else None
            if label in known and fits(known[label], connection) and modes.get(label) == was:
                self.chardevs[label] = connection
            else:
                from cpr.chardev.socket import forget

                forget(connection)

    def monitor(self, chardev: Chardev) -> dict[str, Any] | None:
        """What the monitor on `chardev` knows of its client, where that is there as before."""
        connection = self.chardevs.get(chardev.label)
        monitor = self._kept.get(f"{MONITOR}{chardev.label}")
        if connection is None or monitor is None:
            return None
        return monitor.data if connection.data["connected"] and chardev.connected else None
