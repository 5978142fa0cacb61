"""-drive, -fda, -hda …: the disk images, and the slots of the machine they are in.

Slots are counted as QEMU does: two floppies are units 0 and 1 of bus 0, four IDE disks are units 0
and 1 of buses 0 and 1.  A drive without index=, or bus= and unit=, goes into the first free slot.
"""

from __future__ import annotations

from cpr.errors import ConfigError
from cpr.option_values import BOOL, INT, STRING
from cpr.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.option_values import Kind
    from cpr.options import OptionGroup

FLOPPY, IDE, NONE = "floppy", "ide", "none"
# QEMU's other interfaces, which this machine has not.
OTHER_INTERFACES = ("scsi", "virtio", "sd", "mtd", "pflash", "xen")
BUSES = {FLOPPY: 1, IDE: 2}
UNITS = 2  # per bus
UNASSIGNED = -1

KEYS: dict[str, Kind] = {
    "id": STRING,
    "file": STRING,
    "format": STRING,
    "driver": STRING,
    "if": STRING,
    "bus": INT,
    "unit": INT,
    "index": INT,
    "media": STRING,
    "readonly": BOOL,
    "read-only": BOOL,
    "snapshot": BOOL,
    "cache": STRING,
    "aio": STRING,
    "discard": STRING,
}

# Tuning that has no effect on what the guest sees: checked, then left aside.
ACCEPTED = {
    "cache": (
        ("none", "off", "writeback", "writethrough", "directsync", "unsafe"),
        "invalid cache option",
    ),
    "aio": (("threads", "native", "io_uring"), "invalid aio option"),
    "discard": (("ignore", "off", "unmap", "on"), "Invalid discard option"),
}


class DriveConfig(Record):
    """One drive.  `file` is None where no medium is in; `interface` is floppy, ide or none;
    `index` is the slot, and the running number for none; `id` is as `info block` shows it;
    `location` is what an error about it begins with.
    """

    __slots__ = (  # noqa: RUF023 - the order of the constructor
        "file",
        "format",
        "interface",
        "index",
        "readonly",
        "id",
        "location",
    )
    file: str | None
    format: str
    interface: str
    index: int
    readonly: bool
    id: str
    location: str

    def __init__(
        self,
        file: str | None,
        format: str = "raw",
        interface: str = IDE,
        index: int = 0,
        readonly: bool = False,
        id: str = "",
        location: str = "",
    ) -> None:
        self._fill(file, format, interface, index, readonly, id, location)


def parse_drives(groups: list[OptionGroup]) -> tuple[DriveConfig, ...]:
    """All drives, in the order given.

    A drive of the command line replaces one of guest.cfg that has the same slot.  Raises
    ConfigError.
    """
    taken: dict[tuple[str, int], tuple[DriveConfig, bool]] = {}
    for group in groups:
        drive = _parse_drive(group, taken)
        slot = drive.interface, drive.index
        if slot in taken and (group.base or not taken.pop(slot)[1]):
            bus, unit = _bus_and_unit(*slot)
            raise group.error(f"drive with bus={bus}, unit={unit} (index={drive.index}) exists")
        taken[slot] = drive, group.base
    return tuple(drive for drive, _ in taken.values())


def _parse_drive(group: OptionGroup, taken: dict[tuple[str, int], Any]) -> DriveConfig:
    group.check_id()
    values = group.typed(KEYS)
    interface = values.get("if", IDE)
    if interface not in (FLOPPY, IDE, NONE, *OTHER_INTERFACES):
        raise group.error(f"unsupported bus type '{interface}'")
    index = _index(group, interface, values)
    if index == UNASSIGNED:
        index = 0
        while (interface, index) in taken:
            index += 1
    bus, unit = _bus_and_unit(interface, index)
    if interface != NONE and not 0 <= bus < BUSES.get(interface, 0):
        raise group.error(f"machine type does not support if={interface},bus={bus},unit={unit}")
    file = _medium(group, interface, values)
    readonly = _readonly(group, interface, values)
    identifier = values.get("id", _default_id(interface, bus, unit))
    return DriveConfig(file, "raw", interface, index, readonly, identifier, group.location)


def _index(group: OptionGroup, interface: str, values: dict[str, Any]) -> int:
    index = int(values.get("index", UNASSIGNED))
    if index != UNASSIGNED and ("bus" in values or "unit" in values):
        if values.get("unit", UNASSIGNED) != UNASSIGNED or values.get("bus", 0):
            raise group.error("index cannot be used with bus and unit")
        return index
    if "unit" in values:
        bus, unit = int(values.get("bus", 0)), int(values["unit"])
        if interface == IDE and unit >= UNITS:
            raise group.error(f"unit {unit} too big (max is {UNITS - 1})")
        return bus * UNITS + unit
    return index


def _bus_and_unit(interface: str, index: int) -> tuple[int, int]:
    return divmod(index, UNITS) if interface == IDE else (0, index)
