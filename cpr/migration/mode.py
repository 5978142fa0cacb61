"""What differs between the migration modes: what goes before the stream, in it, and after it.

normal        RAM and devices in the stream; the source ends in postmigrate
cpr-reboot    the same, with the guest stopped from the beginning
cpr-transfer  the descriptors over a socket, devices in the stream; the source ends in postmigrate
cpr-exec      the descriptors over the exec, devices in the stream; there is no source left
"""

from __future__ import annotations

from cpr import runstate
from cpr.constants import EXEC as EXEC
from cpr.constants import NORMAL
from cpr.constants import TRANSFER as TRANSFER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.ram import RAMBlock


class Mode:
    """One migration's mode; this one is `normal` or `cpr-reboot`.

    `stops_first`: the guest is stopped before the migration is `active`.  `ends_process`: after
    `finish` there is another image, or an error.  `regenerates`: the new image makes the machine's
    own blocks again.  `stages`: RAM that it could not map is copied for it.
    """

    ends_process = False
    regenerates = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.stops_first = name != NORMAL
        self.stages = False

    def begin(self, go_on: Callable[[], None]) -> bool:
        """Sends the CPR state, if the mode has one.

        True where `go_on` will be called later, on the main loop, and the migration waits for
        that.  Raises MigrationError.
        """
        return False

    def stop(self, machine: Machine) -> None:
        """Stops the guest, for the rest of the migration."""
        machine.stop(runstate.FINISH_MIGRATE)

    def sends(self, block: RAMBlock, ignore_shared: bool) -> bool:
        """Whether the pages of `block` are in the stream."""
        return not (ignore_shared and block.reopened)

    def blockers(self, machine: Machine) -> list[str]:
        """Why the guest would not survive this."""
        return device_blockers(machine, self.name)

    def finish(self, machine: Machine) -> None:
        """The stream is written and closed.  Raises MigrationError where the end fails."""
        machine.runstate.set(runstate.POSTMIGRATE)

    def walk_back(self) -> None:
        """The inverse of `hold` and `begin`; may be called at any time."""


def device_blockers(machine: Machine, mode: str) -> list[str]:
    """The texts of the devices that would not survive `mode`."""
    reasons = [device.cpr_blocker(mode) for device in machine.devices]
    return [reason for reason in reasons if reason]


def cpr_blockers(machine: Machine, mode: Mode) -> list[str]:
    """The same, and those of RAM, unless it is staged; see RAMBlock.cpr_blocker."""
    reasons = []
    if not mode.stages:
        reasons = [block.cpr_blocker(mode.regenerates) for block in machine.blocks]
    return device_blockers(machine, mode.name) + [reason for reason in reasons if reason]
