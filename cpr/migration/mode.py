"""What differs between the migration modes: what goes before the stream, in it, and after it.

normal        RAM and devices in the stream; the source ends in postmigrate
cpr-reboot    the same, with the guest stopped from the beginning
cpr-transfer  the descriptors over a socket, devices in the stream; the source ends in postmigrate
cpr-exec      the descriptors over the exec, devices in the stream; there is no source left
"""

from __future__ import annotations

from cpr.constants import EXEC as EXEC
from cpr.constants import NORMAL
from cpr.constants import TRANSFER as TRANSFER
from cpr.migration import holder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.migration.cpr_exec import Exec
    from cpr.ram import RAMBlock


class Mode:
    """One migration's mode; this one is `normal` or `cpr-reboot`.

    `stops_first`: the guest is stopped before the migration is `active`.  `ends_process`: after
    `finish` there is another image, or an error.  `regenerates`: the new image makes the machine's
    own blocks again.  `tells_owner`: a token or a lock says whose the guest is, whoever has read
    the stream.  `stages`: RAM that it could not map is copied for it.  `stopped_ns` is when the
    guest was stopped for it.  After a `finish` that failed, `ended_by` is the signal that ended the
    new image, and the VM with it, or 0; `gives_back` is what goes on at once where that has
    refused, and what becomes of the update is told later, or None.
    """

    ends_process = False
    regenerates = True
    tells_owner = False
    gives_back: Callable[[], None] | None = None
    ended_by = 0

    def __init__(self, name: str, stages: bool = False) -> None:
        self.name = name
        self.stops_first = name != NORMAL
        self.stages = stages
        self.stopped_ns = 0

    def check(self) -> None:
        """Raises MigrationError where the mode has not been told all that it needs."""

    def early_exec(self, *settings: str) -> Exec | None:
        """This mode, if it is an exec with which the guest runs on until the new program is ready.

        `settings` are those of x-cpr-exec-overlap with which it does.  May take a program's start.
        """
        return None

    @property
    def reopens_files(self) -> bool:
        """Whether the other VMM opens files of RAM by their paths, as far as is known."""
        return True

    def ask(self) -> None:
        """Finds out what takes long, before anything has begun.  Raises MigrationError."""

    def prepare(self, machine: Machine) -> None:
        """Does what takes long, before there is anything to undo.  Raises CprError."""

    def begin(self, go_on: Callable[[], None]) -> bool:
        """Sends the CPR state, if the mode has one.

        True where `go_on` will be called later, on the main loop, and the migration waits for
        that.  Raises MigrationError.
        """
        return False

    def sends(self, block: RAMBlock, ignore_shared: bool) -> bool:
        """Whether the pages of `block` are in the stream."""
        return not (ignore_shared and block.reopened)

    def blockers(self, machine: Machine) -> list[str]:
        """Why the guest would not survive this."""
        return device_blockers(machine, self.name)

    def finish(self, machine: Machine) -> None:
        """The stream is written and closed.  Raises MigrationError where the end fails."""
        shared = self.shared(machine.blocks)
        machine.shares_ram |= bool(shared)
        machine.leave_guest()  # first: another VMM may run it from now on, whatever fails here
        holder.let_go(shared)
        holder.give_guest_away(shared)

    def shared(self, blocks: list[RAMBlock]) -> list[RAMBlock]:
        """Which of them another VMM maps too."""
        return [block for block in blocks if block.reopened]

    def rollback(self) -> None:
        """The inverse of `begin`; may be called at any time."""


class KeepsRam(Mode):
    """A mode in which the new image maps the same RAM: no page of it is in the stream."""

    tells_owner = True

    def shared(self, blocks: list[RAMBlock]) -> list[RAMBlock]:
        return blocks

    def sends(self, block: RAMBlock, ignore_shared: bool) -> bool:
        return False

    def blockers(self, machine: Machine) -> list[str]:
        """Those of RAM too, unless it is staged; see RAMBlock.cpr_blocker."""
        reasons = super().blockers(machine)
        if not self.stages:
            of_ram = [block.cpr_blocker(self.regenerates) for block in machine.blocks]
            reasons += [reason for reason in of_ram if reason]
        return reasons


def device_blockers(machine: Machine, mode: str) -> list[str]:
    """The texts of the devices that would not survive `mode`."""
    reasons = [device.cpr_blocker(mode) for device in machine.devices]
    return [reason for reason in reasons if reason]
