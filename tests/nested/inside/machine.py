"""The VM's PCI devices as the kernel shows them, and their binding to vfio-pci."""

from __future__ import annotations

from pathlib import Path

# The addresses that vm.py gives the devices.
EDU = "0000:00:04.0"
E1000E = "0000:00:05.0"
NVME = "0000:00:07.0"
SECOND_EDU = "0000:00:08.0"
TWINS = ("0000:00:09.0", "0000:00:09.1")  # two edu that share a group

DEVICES = (EDU, E1000E, NVME, SECOND_EDU, *TWINS)

PCI = Path("/sys/bus/pci")
DRIVER = "vfio-pci"
INTX_DISABLE = 0x400  # of PCI_COMMAND


def device(address: str) -> Path:
    """The device's folder in sysfs."""
    return PCI / "devices" / address


def driver(address: str) -> str | None:
    """The name of the driver that the device is bound to."""
    link = device(address) / "driver"
    return link.resolve().name if link.exists() else None


def bind(address: str) -> None:
    """Binds a device to vfio-pci, as the administrator of a host does; `unbind` is the inverse."""
    if driver(address) == DRIVER:
        return
    unbind(address)
    (device(address) / "driver_override").write_text(DRIVER)
    (PCI / "drivers_probe").write_text(address)
    assert driver(address) == DRIVER, f"{address} is bound to {driver(address)}"


def unbind(address: str) -> None:
    if driver(address) is not None:
        (device(address) / "driver" / "unbind").write_text(address)
    (device(address) / "driver_override").write_text("\n")


def group(address: str) -> int:
    """The number of the device's IOMMU group: /dev/vfio/NUMBER."""
    return int((device(address) / "iommu_group").resolve().name)


def cdev(address: str) -> str:
    """The device's own character device, /dev/vfio/devices/vfioN; only with iommufd."""
    (name,) = (each.name for each in (device(address) / "vfio-dev").iterdir())
    return f"/dev/vfio/devices/{name}"


def command(address: str) -> int:
    """PCI_COMMAND as the device itself has it."""
    return int.from_bytes((device(address) / "config").read_bytes()[4:6], "little")
