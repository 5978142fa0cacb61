"""What sysfs tells of VFIO devices: drivers, IOMMU groups, and the remedies for what is missing."""

from __future__ import annotations

import os

DIRECTORY = "/dev/vfio"
DEVICES = "/sys/bus/pci/devices"


def bind_remedy(address: str) -> str:
    """How the device at PCI `address` is given to vfio-pci."""
    folder = f"{DEVICES}/{address}"
    text = (
        f"bind {address} to vfio-pci: echo vfio-pci > {folder}/driver_override; "
        f"echo {address} > /sys/bus/pci/drivers_probe"
    )
    driver = driver_of(address)
    if driver == "vfio-pci":
        return f"{address} is bound to vfio-pci, but its IOMMU group is not there: see dmesg"
    if driver is not None:
        text += f" (after echo {address} > {folder}/driver/unbind: {driver} has it)"
    return text


def viable_remedy(address: str) -> str:
    """Which other devices of the group must be given up by their drivers first."""
    others = [
        f"{each} ({driver})"
        for each in group_devices(address)
        if (driver := driver_of(each)) not in (None, "vfio-pci", "pcieport", "pci-stub")
    ]
    if not others:
        return "ensure that all devices of the IOMMU group are bound to vfio-pci or to no driver"
    return "bind these to vfio-pci too, or to no driver: " + ", ".join(others)


def driver_of(address: str) -> str | None:
    """The name of the driver that has the device at PCI `address`, or None."""
    try:
        return os.path.basename(os.readlink(f"{DEVICES}/{address}/driver"))
    except OSError:
        return None


def group_devices(address: str) -> list[str]:
    """The PCI addresses of all devices in the IOMMU group of `address`."""
    try:
        return sorted(os.listdir(f"{DEVICES}/{address}/iommu_group/devices"))
    except OSError:
        return []


def group_of(sysfs: str) -> int | None:
    """The IOMMU group of the device in the sysfs folder `sysfs`, or None where it has none."""
    try:
        return int(os.path.basename(os.readlink(os.path.join(sysfs, "iommu_group"))))
    except (OSError, ValueError):
        return None


def cdev_path(sysfs: str) -> str | None:
    """The character device of a device bound to vfio-pci, or None where the kernel has none."""
    try:
        return f"{DIRECTORY}/devices/" + os.listdir(os.path.join(sysfs, "vfio-dev"))[0]
    except (OSError, IndexError):
        return None


def is_mdev(sysfs: str) -> bool:
    """Whether the device is a mediated one, which has no IOMMU of its own."""
    try:
        subsystem = os.path.basename(os.readlink(os.path.join(sysfs, "subsystem")))
    except OSError:
        return False
    return subsystem == "mdev"
