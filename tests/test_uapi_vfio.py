"""VFIO's and IOMMUFD's ABI, and the errors where a host has neither."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
from cpr._native._cpr import ffi, lib

from cpr.errors import KernelError
from cpr.uapi import iommufd, memlock, vfio, vfio_sysfs
from cpr.uapi.fd import Fd

# From the kernel's include/uapi/linux/iommufd.h and vfio.h: type ';', numbers and sizes in bytes.
REQUESTS = {
    "VFIO_GET_API_VERSION": 100,
    "VFIO_CHECK_EXTENSION": 101,
    "VFIO_SET_IOMMU": 102,
    "VFIO_GROUP_GET_STATUS": 103,
    "VFIO_GROUP_SET_CONTAINER": 104,
    "VFIO_GROUP_GET_DEVICE_FD": 106,
    "VFIO_DEVICE_GET_INFO": 107,
    "VFIO_DEVICE_GET_REGION_INFO": 108,
    "VFIO_DEVICE_GET_IRQ_INFO": 109,
    "VFIO_DEVICE_SET_IRQS": 110,
    "VFIO_DEVICE_RESET": 111,
    "VFIO_IOMMU_MAP_DMA": 113,
    "VFIO_IOMMU_UNMAP_DMA": 114,
    "VFIO_DEVICE_BIND_IOMMUFD": 118,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": 119,
    "IOMMU_DESTROY": 0x80,
    "IOMMU_IOAS_ALLOC": 0x81,
    "IOMMU_IOAS_MAP": 0x85,
    "IOMMU_IOAS_UNMAP": 0x86,
    "IOMMU_HWPT_ALLOC": 0x89,
    "IOMMU_IOAS_MAP_FILE": 0x8F,
    "IOMMU_IOAS_CHANGE_PROCESS": 0x92,
}
SIZES = {
    "vfio_group_status": 8,
    "vfio_region_info": 32,
    "vfio_irq_info": 16,
    "vfio_irq_set": 20,
    "vfio_iommu_type1_dma_map": 32,
    "vfio_iommu_type1_dma_unmap": 24,
    "iommu_destroy": 8,
    "iommu_ioas_alloc": 12,
    "iommu_ioas_map": 40,
    "iommu_ioas_map_file": 40,
    "iommu_ioas_unmap": 24,
    "iommu_ioas_change_process": 8,
    "kvm_irqfd": 32,
    "kvm_irq_routing_entry": 48,
    "kvm_msi": 32,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_request_numbers(name: str) -> None:
    assert getattr(lib, name) == ord(";") << 8 | REQUESTS[name]


@pytest.mark.parametrize("name", SIZES)
def test_struct_sizes(name: str) -> None:
    assert ffi.sizeof(f"struct {name}") == SIZES[name]


@pytest.mark.skipif(os.path.exists(vfio.CONTAINER), reason="this host has VFIO")
def test_host_without_vfio() -> None:
    with pytest.raises(KernelError, match=r"failed to open /dev/vfio/vfio.*modprobe vfio-pci"):
        vfio.open_container()
    with pytest.raises(KernelError, match=r"bind 0000:ff:1f.7 to vfio-pci: echo vfio-pci > /sys"):
        vfio.open_group(7, "0000:ff:1f.7")


@pytest.mark.skipif(os.path.exists(iommufd.DEVICE), reason="this host has IOMMUFD")
def test_host_without_iommufd() -> None:
    with pytest.raises(KernelError, match=r"failed to open /dev/iommu.*leave out iommufd="):
        iommufd.open_device()


def test_device_of_another_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_device(tmp_path, monkeypatch, "0000:00:04.0", "e1000e", ["0000:00:04.0", "0000:00:05.0"])
    make_device(tmp_path, monkeypatch, "0000:00:05.0", "nvme", [])
    assert "(after echo 0000:00:04.0 >" in vfio_sysfs.bind_remedy("0000:00:04.0")
    assert "e1000e has it" in vfio_sysfs.bind_remedy("0000:00:04.0")
    assert vfio_sysfs.viable_remedy("0000:00:04.0") == (
        "bind these to vfio-pci too, or to no driver: 0000:00:04.0 (e1000e), 0000:00:05.0 (nvme)"
    )
    assert vfio_sysfs.group_of(str(tmp_path / "0000:00:04.0")) is None


def make_device(
    root: Path, monkeypatch: pytest.MonkeyPatch, address: str, driver: str, group: list[str]
) -> None:
    """A folder as sysfs has for a device."""
    monkeypatch.setattr(vfio_sysfs, "DEVICES", str(root))
    folder = root / address
    (folder / "iommu_group" / "devices").mkdir(parents=True)
    (root / driver).mkdir(exist_ok=True)
    (folder / "driver").symlink_to(root / driver)
    for member in group:
        (folder / "iommu_group" / "devices" / member).touch()


def test_memlock_remedy_names_the_limit() -> None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = memlock.memlock_remedy(64 << 20)
    assert text.startswith("65536 KiB more must be locked")
    assert ("unlimited" if limit == resource.RLIM_INFINITY else str(limit >> 10)) in text


def test_room_for_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64 << 20, 64 << 20))
    assert memlock.has_room(64 << 20)
    with open("/proc/self/status") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    may_lock = bool(int(effective.split()[1], 16) >> 14 & 1)  # CAP_IPC_LOCK
    assert memlock.has_room((64 << 20) + 1) == may_lock
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda which: (unlimited, unlimited))
    assert memlock.has_room(1 << 60)


@pytest.mark.parametrize(
    ("call", "operation"),
    [
        (lambda fd: vfio.map_dma(fd, 0x1000, 0x2000, 0x5000), "VFIO_IOMMU_MAP_DMA of 0x2000 bytes"),
        (lambda fd: vfio.update_vaddr(fd, 0x1000, 0x2000, 0x5000), "VFIO_IOMMU_MAP_DMA of 0x2000"),
        (vfio.invalidate_vaddrs, "VFIO_IOMMU_UNMAP_DMA"),
        (vfio.set_iommu, "VFIO_CHECK_EXTENSION"),
        (lambda fd: vfio.get_device_fd(fd, "0000:00:04.0"), "VFIO_GROUP_GET_DEVICE_FD of 0000"),
        (lambda fd: vfio.set_triggers(fd, 2, 0, [3, -1]), "VFIO_DEVICE_SET_IRQS of index 2"),
        (vfio.reset, "VFIO_DEVICE_RESET"),
        (lambda fd: vfio.bind_iommufd(fd, fd), "VFIO_DEVICE_BIND_IOMMUFD on"),
        (iommufd.alloc_ioas, "IOMMU_IOAS_ALLOC"),
        (lambda fd: iommufd.map_file(fd, 1, 0, 4096, 3, 0), "IOMMU_IOAS_MAP_FILE of 0x1000"),
        (lambda fd: iommufd.change_process(fd, 0), "IOMMU_IOAS_CHANGE_PROCESS.*6.13"),
    ],
)
def test_refused_ioctl_names_itself(call: object, operation: str) -> None:
    """On a descriptor that is no VFIO one the kernel refuses every request."""
    number = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    fd = Fd(number, "/dev/null")
    try:
        with pytest.raises(KernelError, match=operation) as caught:
            call(fd)  # type: ignore[operator]
        assert caught.value.errno == errno.ENOTTY
    finally:
        fd.close()
