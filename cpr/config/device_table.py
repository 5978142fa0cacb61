"""The devices that -device can make, one row each.

A device is one file, its module, and its row here: parsing, -help, `-device help` and the making of
the machine follow from that.  The module is imported only where the device is asked for.
"""

from __future__ import annotations

from cpr.config.option_values import BOOL, INT, STRING
from cpr.config.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config.option_values import Kind


class DeviceModel(Record):
    """A row.  `module` has `create(board, config)`, which raises CprError or ValueError.

    `usage` is what -help shows after the device's name; `chardev` is what its chardev is a
    property of in QEMU's errors, or None where it has none.
    """

    __slots__ = ("module", "usage", "properties", "chardev", "needs_chardev")  # noqa: RUF023
    module: str
    usage: str
    properties: dict[str, Kind]
    chardev: str | None
    needs_chardev: bool

    def __init__(
        self,
        module: str,
        usage: str,
        properties: dict[str, Kind],
        chardev: str | None = None,
        needs_chardev: bool = False,
    ) -> None:
        self._fill(module, usage, properties, chardev, needs_chardev)


VIRTIO: dict[str, Kind] = {
    "addr": STRING,
    "bus": STRING,
    "disable-legacy": STRING,
    "disable-modern": BOOL,
    "vectors": INT,
}
"""What all virtio devices have; legacy is off whatever is said of it."""

DEVICES: dict[str, DeviceModel] = {
    "isa-debug-exit": DeviceModel(
        "cpr.devices.debug_exit",
        "[,iobase=PORT][,iosize=N]",
        {"iobase": INT, "iosize": INT},
    ),
    "isa-debugcon": DeviceModel(
        "cpr.devices.debugcon",
        ",chardev=ID[,iobase=PORT][,readback=BYTE]",
        {"chardev": STRING, "iobase": INT, "readback": INT},
        chardev="isa-debugcon",
        needs_chardev=True,
    ),
    "isa-serial": DeviceModel(
        "cpr.devices.isa_serial",
        "[,chardev=ID][,index=N][,iobase=PORT][,irq=N]",
        {
            "baudbase": INT,
            "chardev": STRING,
            "index": INT,
            "iobase": INT,
            "irq": INT,
            "wakeup": BOOL,
        },
        chardev="serial",
    ),
    "vfio-pci": DeviceModel(
        "cpr.devices.vfio_options",
        ",host=[DDDD:]BB:DD.F[,iommufd=ID][,addr=SLOT]",
        {"addr": STRING, "fd": STRING, "host": STRING, "iommufd": STRING, "sysfsdev": STRING},
    ),
    "virtio-blk-pci": DeviceModel(
        "cpr.devices.virtio.blk",
        ",drive=ID[,serial=TEXT][,num-queues=N][,addr=SLOT]",
        {
            **VIRTIO,
            "bootindex": INT,
            "drive": STRING,
            "num-queues": INT,
            "queue-size": INT,
            "rerror": ("report", "ignore", "stop", "auto"),
            "serial": STRING,
            "werror": ("report", "ignore", "stop", "enospc", "auto"),
            "write-cache": ("on", "off", "auto"),
        },
    ),
    "virtio-net-pci": DeviceModel(
        "cpr.devices.virtio.net",
        ",netdev=ID[,mac=ADDRESS][,addr=SLOT]",
        {**VIRTIO, "bootindex": INT, "mac": STRING, "netdev": STRING, "romfile": STRING},
    ),
    "virtio-balloon-pci": DeviceModel(
        "cpr.devices.virtio.balloon",
        "[,deflate-on-oom=on][,addr=SLOT]",
        {**VIRTIO, "deflate-on-oom": BOOL},
    ),
    "virtio-rng-pci": DeviceModel(
        "cpr.devices.virtio.rng",
        "[,max-bytes=N,period=MS][,addr=SLOT]",
        {**VIRTIO, "max-bytes": INT, "period": INT},
    ),
    "virtio-serial-pci": DeviceModel(
        "cpr.devices.virtio.serial", "[,addr=SLOT]", {**VIRTIO, "max_ports": INT}
    ),
    "virtconsole": DeviceModel(
        "cpr.devices.virtio.console",
        "[,chardev=ID]",
        {"bus": STRING, "chardev": STRING, "name": STRING, "nr": INT},
        chardev="virtconsole",
    ),
}
