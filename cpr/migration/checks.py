"""What refuses a migration before anything is touched, in QEMU's order and words."""

from __future__ import annotations

from cpr import runstate
from cpr.errors import MigrationError
from cpr.migration.address import connects_in_background
from cpr.migration.capabilities import IN_PROGRESS
from cpr.migration.channel import locate
from cpr.migration.mode import NORMAL, TRANSFER
from cpr.ram_backend import lost_files, overwrites

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.machine import Machine
    from cpr.migration.capabilities import Capabilities
    from cpr.migration.channel import Handed
    from cpr.migration.mode import Mode

NOT_WITH_CPR = (
    ("postcopy-ram", "Cannot use postcopy with CPR"),
    ("dirty-bitmaps", "Cannot use postcopy with CPR"),
    ("background-snapshot", "Cannot use background snapshot with CPR"),
    ("x-colo", "Cannot use COLO with CPR"),
)


def check(
    machine: Machine,
    capabilities: Capabilities,
    address: dict,
    mode: Mode,
    running: bool,
    handed: Handed,
    resume: bool = False,
) -> None:
    """Raises MigrationError for what speaks against a migration in `mode` to `address` now.

    `running`: there is one already.  `handed` are the monitors' descriptors, to which the address
    may refer.  `resume` is that of the command.
    """
    background = connects_in_background(address)
    if capabilities.enabled("multifd") and not background:
        raise MigrationError("Migration requires multi-channel URIs (e.g. tcp)")
    if capabilities.enabled("mapped-ram") and address["transport"] != "file":
        raise MigrationError("Migration requires seekable transport (e.g. file)")
    if mode.name == TRANSFER and not background:
        raise MigrationError("Migration requires streamable transport (eg unix)")
    if resume:
        raise MigrationError("Cannot resume if there is no paused migration")
    if running:
        raise MigrationError(IN_PROGRESS)
    if machine.runstate.current == runstate.INMIGRATE:
        raise MigrationError("Guest is waiting for an incoming migration")
    if machine.runstate.current == runstate.POSTMIGRATE:
        raise MigrationError("Can't migrate the vm that was paused due to previous migration")
    if address["transport"] == "file":
        _check_file(machine, address.get("filename", ""), handed)
    mode.check()
    for reason in mode.blockers(machine):
        raise MigrationError(reason)
    if mode.reopens_files and (mode.ends_process or "chroot" not in machine.config.run_with):
        ignored = capabilities.enabled("x-ignore-shared")
        for reason in lost_files(b for b in machine.blocks if not mode.sends(b, ignored)):
            raise MigrationError(reason)
    if mode.name != NORMAL:
        for capability, text in NOT_WITH_CPR:
            if capabilities.enabled(capability):
                raise MigrationError(text)


def _check_file(machine: Machine, path: str, handed: Handed) -> None:
    try:
        where = locate(path, True, handed)
    except OSError:
        return  # it is told where it is opened
    if refusal := overwrites(machine.files(), path, where):
        raise MigrationError(refusal)
