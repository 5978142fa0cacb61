"""The command line and guest.cfg as a Config: parsed and checked, nothing opened or changed.

    [guest.cfg] [QEMU options]

guest.cfg is the base, in the format of QEMU's -readconfig, and the options win over it: key by key
for what there is once (-machine, -m, -smp, -name …); an -object, -chardev, -mon, -drive or -device
replaces the one with the same id, a drive also the one in the same slot; -accel or -machine accel=
replaces all of its accelerators; -monitor, -qmp and -mon replace its monitors of the same mode,
together with the chardevs that only those used (`-monitor none` leaves none at all).  A -readconfig
FILE is as in QEMU: what is in it counts as if it were given there.

Without -nodefaults there is a monitor on stdio, unless one is given, something else uses stdio or
-daemonize is given; and COM1, unless there is a -serial or an isa-serial device, goes nowhere.
"""

from __future__ import annotations

from cpr.config.chardev_options import ChardevConfig, Frontend, parse_chardev
from cpr.config.command_line import read_command_line, strip_options
from cpr.config.device_options import DeviceConfig, parse_devices, parse_global
from cpr.config.draft import Draft
from cpr.config.drive_options import VIRTIO, DriveConfig, parse_drives
from cpr.config.frontend_options import (
    SHORT_FORM,
    ChardevTable,
    MonitorConfig,
    connect_serials,
    overridden_monitors,
    parse_monitors,
)
from cpr.config.machine_options import (
    DEFAULT_ACCELS,
    MACHINE_TYPE,
    check_backend,
    parse_boot,
    parse_machine,
    parse_memory,
    parse_smp,
    subtree,
    with_megabytes,
)
from cpr.config.netdev_options import NetdevConfig, parse_netdevs
from cpr.config.object_options import ObjectConfig, parse_object
from cpr.config.record import Record
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cpr.config.options import OptionGroup

__all__ = [
    "ChardevConfig",
    "Config",
    "DeviceConfig",
    "DriveConfig",
    "MonitorConfig",
    "NetdevConfig",
    "ObjectConfig",
    "parse_command_line",
    "strip_options",
]

ISA_SERIAL = "isa-serial"
VIRTIO_DISK = "virtio-blk-pci"  # what -drive if=virtio makes
DEBUGCON = "debugcon"
DEBUGCON_PORT = 0xE9
DEFAULT_ACTIONS = {
    "reboot": "reset",
    "shutdown": "poweroff",
    "panic": "shutdown",
    "watchdog": "reset",
}


class Config(Record):
    """What the VMM is asked to be.

    action, action_text   None and "", or "help" or "version" and what to print on stdout: then
                          nothing is to be run, and the rest is only the defaults
    accels                names to try in this order; kvm, then tcg, where none is given (QEMU's
                          own default is tcg alone)
    actions               what -action says, with QEMU's defaults: reboot, shutdown, panic, watchdog
    argv                  the command line that was parsed
    boot_order            QEMU's letters: a, b floppies, c disk; "cad" where none is given
    chardevs              all of them, the explicit ones first
    devices               those of -device, in order
    globals               (driver, property, value) of each -global; those of devices are in their
                          properties already
    incoming              each -incoming as given; `option_json.parse_channel` reads those that are
                          neither "defer" nor a URI
    machine               the properties of -machine that were given, e.g. "aux-ram-share": True,
                          "memory-backend": "ram0"; without type, accel, kernel, initrd, append
    machine_type          "pc", for all of its names
    no_reboot, no_shutdown  whether actions say so
    ram_size              bytes; ram_size_given is whether -m says so, or else a memory backend or
                          the default of 128 MiB
    rtc                   what -rtc gives: "base", "clock"
    run_with              what -run-with gives: "user", "chroot", "exit-with-parent",
                          "async-teardown"; "location", where it does
    sandbox               what was given: "enable" as bool, the others as "allow", "deny" or
                          "children"
    serials               chardev ids, by COM port (0 is COM1); None where -serial none is given
    smp                   the number of vCPUs
    timestamps            -msg timestamp=on: messages begin with the time
    warnings              what QEMU warns of, to be printed after the program's name, one by one
    """

    __slots__ = (
        "accels",
        "action",
        "action_text",
        "actions",
        "append",
        "argv",
        "boot_order",
        "chardevs",
        "cpu_model",
        "daemonize",
        "devices",
        "drives",
        "globals",
        "incoming",
        "initrd",
        "kernel",
        "machine",
        "machine_type",
        "monitors",
        "name",
        "netdevs",
        "no_reboot",
        "no_shutdown",
        "nodefaults",
        "objects",
        "only_migratable",
        "pidfile",
        "process_name",
        "ram_size",
        "ram_size_given",
        "rtc",
        "run_with",
        "sandbox",
        "serials",
        "smp",
        "start_paused",
        "timestamps",
        "uuid",
        "warnings",
    )
    accels: tuple[str, ...]
    action: str | None
    action_text: str
    actions: dict[str, str]
    append: str | None
    argv: tuple[str, ...]
    boot_order: str
    chardevs: tuple[ChardevConfig, ...]
    cpu_model: str | None
    daemonize: bool
    devices: tuple[DeviceConfig, ...]
    drives: tuple[DriveConfig, ...]
    globals: tuple[tuple[str, str, str], ...]
    incoming: tuple[str, ...]
    initrd: str | None
    kernel: str | None
    machine: dict[str, Any]
    machine_type: str
    monitors: tuple[MonitorConfig, ...]
    name: str | None
    netdevs: tuple[NetdevConfig, ...]
    no_reboot: bool
    no_shutdown: bool
    nodefaults: bool
    objects: tuple[ObjectConfig, ...]
    only_migratable: bool
    pidfile: str | None
    process_name: str | None
    ram_size: int
    ram_size_given: bool
    rtc: dict[str, str]
    run_with: dict[str, Any]
    sandbox: dict[str, Any]
    serials: tuple[str | None, ...]
    smp: int
    start_paused: bool
    timestamps: bool
    uuid: str | None
    warnings: tuple[str, ...]

    def __init__(self, **fields: Any) -> None:
        self._fill(*(fields.pop(name) for name in self.__slots__))
        assert not fields, fields


def parse_command_line(argv: Sequence[str]) -> Config:
    """The Config of the words that follow `run`.

    Raises ConfigError with QEMU's text, which says where: "-m foo: …", "guest.cfg:12: …".
    """
    draft = read_command_line(argv)
    if draft.action is not None:
        asked, draft = draft, Draft()
        draft.action, draft.action_text = asked.action, asked.action_text
    fields = _settings(draft)
    fields.update(_board(draft))
    fields.update(_frontends(draft, fields))
    drives = parse_drives(draft.groups["drive"])
    drives += _blockdevs(draft, drives)
    fields["devices"] += tuple(
        DeviceConfig(VIRTIO_DISK, None, {"drive": drive.id}, drive.location)
        for drive in drives
        if drive.interface == VIRTIO
    )
    return Config(
        **fields,
        argv=tuple(argv),
        drives=drives,
        incoming=tuple(draft.incoming),
        netdevs=_netdevs(draft, fields["devices"]),
        warnings=tuple(draft.warnings),
    )


def _blockdevs(draft: Draft, drives: tuple[DriveConfig, ...]) -> tuple[DriveConfig, ...]:
    """Raises ConfigError."""
    if not draft.groups["blockdev"]:
        return ()
    from cpr.config.blockdev_options import parse_blockdevs

    found = parse_blockdevs(draft.groups["blockdev"])
    names = {each.id for each in found}
    for drive in drives:
        if drive.id in names:
            raise ConfigError(
                f"{drive.location}: Device name '{drive.id}' conflicts with an existing node name"
            )
    return found


def _netdevs(draft: Draft, devices: tuple[DeviceConfig, ...]) -> tuple[NetdevConfig, ...]:
    """Raises ConfigError; warns of what no card is on."""
    netdevs = parse_netdevs(draft.groups["netdev"])
    used = {device.properties.get("netdev") for device in devices}
    for netdev in netdevs:
        if netdev.id not in used:
            draft.warnings.append(f"warning: netdev {netdev.id} has no peer")
    return netdevs


def _settings(draft: Draft) -> dict[str, Any]:
    """What stands for itself."""
    actions = DEFAULT_ACTIONS | draft.single("action")
    name = draft.single("name")
    settings = draft.settings
    return {
        "action": draft.action,
        "action_text": draft.action_text,
        "actions": actions,
        "cpu_model": settings.get("cpu_model"),
        "daemonize": settings.get("daemonize", False),
        "globals": tuple(parse_global(group) for group in draft.groups["global"]),
        "name": name.get("guest"),
        "no_reboot": actions["reboot"] == "shutdown",
        "no_shutdown": actions["shutdown"] == "pause",
        "nodefaults": settings.get("nodefaults", False),
        "only_migratable": settings.get("only_migratable", False),
        "pidfile": settings.get("pidfile"),
        "process_name": name.get("process"),
        "rtc": draft.single("rtc"),
        "run_with": draft.single("run-with"),
        "sandbox": draft.single("sandbox"),
        "start_paused": settings.get("start_paused", False),
        "timestamps": draft.single("msg").get("timestamp", False),
        "uuid": settings.get("uuid"),
    }


def _board(draft: Draft) -> dict[str, Any]:
    """The machine, its accelerators, RAM and vCPUs."""
    objects = tuple(parse_object(group) for group in draft.groups["object"])
    values = draft.single("machine")
    machine = parse_machine(values)
    kernel, append, initrd = (machine.pop(name, None) for name in ("kernel", "append", "initrd"))
    if kernel == "":
        raise ConfigError("could not open kernel file '': No such file or directory")
    if append is not None and kernel is None:
        raise ConfigError("-append only allowed with -kernel option")
    if initrd is not None and kernel is None:
        raise ConfigError("-initrd only allowed with -kernel option")
    size = parse_memory(subtree(values, "memory", with_megabytes(draft.single("memory"))))
    return {
        "accels": draft.accels() or DEFAULT_ACCELS,
        "append": append,
        "boot_order": parse_boot(subtree(values, "boot", draft.single("boot-opts"))),
        "initrd": initrd,
        "kernel": kernel,
        "machine": machine,
        "machine_type": MACHINE_TYPE,
        "objects": objects,
        "ram_size": check_backend(machine, size, {one.id: one for one in objects}),
        "ram_size_given": size != 0,
        "smp": parse_smp(subtree(values, "smp", draft.single("smp-opts"))),
    }


def _frontends(draft: Draft, settings: dict[str, Any]) -> dict[str, Any]:
    """Chardevs and their users, in QEMU's order: monitors, serial ports, devices."""
    overridden = overridden_monitors(draft.groups["mon"])
    monitor_groups = [group for group in draft.groups["mon"] if group not in overridden]
    table = ChardevTable(settings["daemonize"], draft.warnings)
    for group in _needed_chardevs(draft, monitor_groups, overridden):
        table.add(parse_chardev(group))
    monitors = parse_monitors(monitor_groups, table)
    serials = connect_serials(draft.serials, table)
    debugcons = [_debugcon(table, argument, where) for argument, where in draft.debugcons]
    devices = parse_devices(draft.groups["device"], settings["globals"], table, draft.warnings)
    if not settings["nodefaults"]:
        if not serials and all(device.driver != ISA_SERIAL for device in devices):
            serials = connect_serials([("null", "")], table)
        if not draft.groups["mon"] and not settings["daemonize"] and not table.uses_stdio:
            frontend = Frontend("stdio", "compat_monitor0", "", "")
            monitors.append(MonitorConfig(table.connect(frontend)))
    return {
        "chardevs": table.chardevs,
        "devices": (*debugcons, *devices),
        "monitors": tuple(monitors),
        "serials": serials,
    }


def _needed_chardevs(
    draft: Draft, monitors: list[OptionGroup], overridden: list[OptionGroup]
) -> list[OptionGroup]:
    """The -chardev groups, without those of guest.cfg that only overridden monitors used."""
    if not overridden:
        return draft.groups["chardev"]
    used = [group.values.get("chardev") for group in (*monitors, *draft.groups["device"])]
    short_forms = [group.values.get(SHORT_FORM, "") for group in monitors]
    short_forms += [text for text, _ in (*draft.serials, *draft.debugcons)]
    used += [text.removeprefix("chardev:") for text in short_forms]
    gone = [group.values.get("chardev") for group in overridden]
    return [
        group
        for group in draft.groups["chardev"]
        if not (group.base and group.values.get("id") in gone and group.values["id"] not in used)
    ]


def _debugcon(table: ChardevTable, argument: str, location: str) -> DeviceConfig:
    refusal = f"invalid character backend '{argument}'"
    chardev = table.connect(Frontend(argument, DEBUGCON, location, refusal))
    properties = {"iobase": DEBUGCON_PORT, "chardev": chardev}
    return DeviceConfig("isa-debugcon", None, properties, location)
