"""-device vfio-pci: from its properties to the device.

host=[DDDD:]BB:DD.F | sysfsdev=PATH | fd=NUMBER   which device
iommufd=ID                                        on -object iommufd,id=ID; else by type1
addr=SLOT                                         where the guest finds it, the first free slot
"""

from __future__ import annotations

import os

from cpr.devices.iommufd import passed_fd
from cpr.devices.pci import parse_slot
from cpr.devices.vfio_cdev import Cdev
from cpr.devices.vfio_pci import VfioPci
from cpr.errors import ConfigError
from cpr.uapi import vfio_sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config import DeviceConfig
    from cpr.devices.board import Board
    from cpr.devices.vfio_pci import Backend


def create(board: Board, config: DeviceConfig) -> None:
    """Makes the device of -device vfio-pci and puts it into the board's machine.

    Raises ConfigError with what is wrong about its properties, KernelError or StateError.
    """
    properties = config.properties
    iommufd = properties.get("iommufd")
    if "fd" in properties and iommufd is None:
        raise ConfigError("Use FD passing only with iommufd backend")
    passed = passed_fd(properties.get("fd"))
    name, sysfs = _identify(properties, config.id, passed)
    addr = properties.get("addr")
    slot = None if addr is None else parse_slot(addr)
    bus, machine = board.pci_host(), board.machine
    machine.accel.check_irqfds()
    backend: Backend = board.type1()
    if iommufd is not None:
        backend = Cdev(board.iommufd(iommufd), machine.accel, board.fds, passed)
    nameless = passed is not None and config.id is None
    machine.add_device(VfioPci(name, sysfs, slot, backend, bus, board.fds, nameless))


def _identify(
    properties: dict[str, Any], identifier: str | None, passed: int | None
) -> tuple[str, str]:
    """(name, sysfs folder) of the device that the properties name.  Raises ConfigError."""
    if passed is not None:
        return identifier or f"VFIO_FD{passed}", ""
    sysfs = properties.get("sysfsdev")
    if sysfs is None:
        host = properties.get("host")
        if host is None:
            raise ConfigError(
                "No provided host device; use -device vfio-pci,host=DDDD:BB:DD.F or "
                "-device vfio-pci,sysfsdev=PATH_TO_DEVICE"
            )
        sysfs = f"{vfio_sysfs.DEVICES}/{parse_host(host)}"
    sysfs = os.path.realpath(sysfs)
    if not os.path.isdir(sysfs):
        raise ConfigError(f"vfio {sysfs}: no such host device: No such file or directory")
    return os.path.basename(sysfs), sysfs


def parse_host(text: str) -> str:
    """[domain:]bus:slot.function, hexadecimal, as the whole PCI address.  Raises ConfigError."""
    try:
        rest, _, function = text.partition(".")
        parts = [int(part, 16) for part in rest.split(":")]
        domain, bus, slot = [0, *parts][-3:] if len(parts) in (2, 3) else (-1, 0, 0)
        number = int(function, 8)
        if not (0 <= domain <= 0xFFFF and 0 <= bus <= 0xFF and 0 <= slot < 32 and number < 8):
            raise ValueError(text)
    except ValueError:
        raise ConfigError(f"Property 'vfio-pci.host' doesn't take value '{text}'") from None
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{number}"
