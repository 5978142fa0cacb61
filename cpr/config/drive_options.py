"""-drive, -fda, -hda …: the disk images, and the slots of the machine they are in.

Slots are counted as QEMU does: two floppies are units 0 and 1 of bus 0, four IDE disks are units 0
and 1 of buses 0 and 1.  A drive without index=, or bus= and unit=, goes into the first free slot.
"""

from __future__ import annotations

from cpr.config.option_values import BOOL, INT, STRING
from cpr.config.record import Record
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any

    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

    Slot = tuple[str, int, int]  # interface, bus, unit

FLOPPY, IDE, NONE, VIRTIO = "floppy", "ide", "none", "virtio"
INTERFACES = (FLOPPY, IDE, NONE, "scsi", VIRTIO, "sd", "mtd", "pflash", "xen")
UNLIMITED = (NONE, VIRTIO)
BUSES = {FLOPPY: 1, IDE: 2}
UNITS = 2  # of one bus
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
    "read-only": BOOL,
    "snapshot": BOOL,
    "cache": STRING,
    "aio": STRING,
    "discard": STRING,
    "file.locking": STRING,
    "rerror": STRING,
    "werror": STRING,
}

# Checked; of these only a disk on virtio makes something.
ACCEPTED = {
    "media": (("disk", "cdrom"), "'{}' invalid media"),
    "cache": (
        ("none", "off", "writeback", "writethrough", "directsync", "unsafe"),
        "invalid cache option",
    ),
    "aio": (("threads", "native", "io_uring"), "invalid aio option"),
    "discard": (("ignore", "off", "unmap", "on"), "Invalid discard option"),
    "file.locking": (("auto", "on", "off"), "Parameter 'locking' does not accept value '{}'"),
    "rerror": (("report", "ignore", "stop"), "'{}' invalid read error action"),
    "werror": (("report", "ignore", "stop", "enospc"), "'{}' invalid write error action"),
}

# What else QEMU accepts is not possible here.
ONLY = {"media": "disk", "snapshot": False}

DEFAULT_IDS = {
    FLOPPY: "floppy{unit}",
    IDE: "ide{bus}-hd{unit}",
    NONE: "none{unit}",
    VIRTIO: "virtio{unit}",
}


class DriveConfig(Record):
    """One drive.  `file` is None where no medium is in; `interface` is floppy, ide, virtio or none;
    `index` is the slot, and the running number for the last two; `id` is as `info block` shows it;
    `location` is what an error about it begins with.

    `cache` is QEMU's word; `discards`: blocks may be given back to the host's file system;
    `locking`: other programs are kept away from the file; `rerror` and `werror` are what becomes of
    a read and of a write that fails.
    """

    __slots__ = (  # noqa: RUF023 - the order of the constructor
        "file",
        "format",
        "interface",
        "index",
        "readonly",
        "id",
        "location",
        "cache",
        "discards",
        "locking",
        "rerror",
        "werror",
    )
    file: str | None
    format: str
    interface: str
    index: int
    readonly: bool
    id: str
    location: str
    cache: str
    discards: bool
    locking: bool
    rerror: str
    werror: str

    def __init__(
        self,
        file: str | None,
        format: str = "raw",
        interface: str = IDE,
        index: int = 0,
        readonly: bool = False,
        id: str = "",
        location: str = "",
        cache: str = "writeback",
        discards: bool = False,
        locking: bool = True,
        rerror: str = "report",
        werror: str = "enospc",
    ) -> None:
        self._fill(
            *(file, format, interface, index, readonly, id, location),
            *(cache, discards, locking, rerror, werror),
        )


def parse_drives(groups: list[OptionGroup]) -> tuple[DriveConfig, ...]:
    """All drives, in the order given.

    A drive of the command line replaces one of guest.cfg in the same slot.  Raises ConfigError.
    """
    slots: dict[Slot, tuple[DriveConfig, bool]] = {}
    for group in groups:
        group.check_id()
        values = _values(group)
        slot = interface, bus, unit = _slot(group, values, slots)
        if slot in slots and (group.base or not slots.pop(slot)[1]):
            index = _index(slot)
            raise group.error(f"drive with bus={bus}, unit={unit} (index={index}) exists")
        if interface not in UNLIMITED and not (
            0 <= bus < BUSES.get(interface, 0) and 0 <= unit < UNITS
        ):
            raise group.error(f"machine type does not support if={interface},bus={bus},unit={unit}")
        slots[slot] = _drive(group, values, slot), group.base
    return tuple(drive for drive, _ in slots.values())


def _values(group: OptionGroup) -> dict[str, Any]:
    if "readonly" in group.values:
        if "read-only" in group.values:
            raise group.error("'read-only' and its alias 'readonly' can't be used at the same time")
        group.values["read-only"] = group.values.pop("readonly")
    values = group.typed(KEYS, "Block format 'raw' does not support the option '{}'")
    for name, (accepted, problem) in ACCEPTED.items():
        if name in values and values[name] not in accepted:
            raise group.error(problem.format(values[name]))
    for name, only in ONLY.items():
        if values.get(name, only) != only:
            given = group.values[name]
            raise group.error(f"{name}={given} is not supported; leave it out")
    return values


def _slot(group: OptionGroup, values: dict[str, Any], taken: Container[Slot]) -> Slot:
    interface = values.get("if", IDE)
    if interface not in INTERFACES:
        raise group.error(f"unsupported bus type '{interface}'")
    index = values.get("index", UNASSIGNED)
    bus, unit = values.get("bus", 0), values.get("unit", UNASSIGNED)
    if index != UNASSIGNED:
        if bus != 0 or unit != UNASSIGNED:
            raise group.error("index cannot be used with bus and unit")
        return (interface, *divmod(index, UNITS)) if interface == IDE else (interface, 0, index)
    if interface == IDE and unit >= UNITS:
        raise group.error(f"unit {unit} too big (max is {UNITS - 1})")
    if unit == UNASSIGNED:
        unit = 0
        while (interface, bus, unit) in taken:
            unit += 1
            if interface == IDE and unit == UNITS:
                bus, unit = bus + 1, 0
    return interface, bus, unit


def _index(slot: Slot) -> int:
    interface, bus, unit = slot
    return bus * UNITS + unit if interface == IDE else unit


def _drive(group: OptionGroup, values: dict[str, Any], slot: Slot) -> DriveConfig:
    interface, bus, unit = slot
    if "driver" in values and "format" in values:
        raise group.error("Cannot specify both 'driver' and 'format'")
    image_format = values.get("format", values.get("driver"))
    if image_format not in (None, "raw"):
        raise group.error(
            f"Unknown driver '{image_format}'\n"
            "Only raw images can be used; qemu-img convert -O raw makes one of any other."
        )
    file = values.get("file") or None
    readonly = values.get("read-only", False)
    if file is None and image_format is not None:
        raise group.error('A block device must be specified for "file"')
    if interface in (IDE, VIRTIO) and file is None:
        raise ConfigError("Device needs media, but drive is empty")
    if interface == IDE and readonly:
        raise ConfigError("Block node is read-only")
    identifier = values.get("id") or DEFAULT_IDS[interface].format(bus=bus, unit=unit)
    return DriveConfig(
        *(file, "raw", interface, _index(slot), readonly, identifier, group.location),
        cache=values.get("cache", "writeback"),
        discards=values.get("discard") in ("unmap", "on"),
        locking=values.get("file.locking") != "off",
        rerror=values.get("rerror", "report"),
        werror=values.get("werror", "enospc"),
    )
