"""VFIO's ioctls as typed functions (linux/vfio.h, Documentation/driver-api/vfio.rst).

The functions take descriptors as Fd, which stay the caller's; what they open is the caller's too.
Every failure is a KernelError that names the ioctl, the device and what to do about it.
"""

from __future__ import annotations

import errno
import os

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError
from cpr.uapi.fd import Fd
from cpr.uapi.memlock import memlock_remedy
from cpr.uapi.vfio_info import RegionInfo
from cpr.uapi.vfio_info import device_info as device_info
from cpr.uapi.vfio_info import irq_info as irq_info
from cpr.uapi.vfio_info import region_info as region_info
from cpr.uapi.vfio_sysfs import DIRECTORY, bind_remedy, viable_remedy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CONTAINER = f"{DIRECTORY}/vfio"
CONFIG_REGION = lib.VFIO_PCI_CONFIG_REGION_INDEX
INTX_IRQ = lib.VFIO_PCI_INTX_IRQ_INDEX
MSI_IRQ = lib.VFIO_PCI_MSI_IRQ_INDEX
MSIX_IRQ = lib.VFIO_PCI_MSIX_IRQ_INDEX
ERR_IRQ = lib.VFIO_PCI_ERR_IRQ_INDEX
REQ_IRQ = lib.VFIO_PCI_REQ_IRQ_INDEX

_TYPE1_REMEDY = (
    "the host's IOMMU cannot isolate interrupts: switch interrupt remapping on in the firmware, "
    "or set allow_unsafe_interrupts=1 of module vfio_iommu_type1 if you trust the guest"
)
_CONTAINER_REMEDIES = {
    errno.ENOENT: "load the kernel's VFIO: modprobe vfio-pci",
    errno.ENODEV: "load the kernel's VFIO: modprobe vfio-pci vfio_iommu_type1",
    errno.EACCES: f"give yourself read and write access to {CONTAINER}",
}


# The container and its groups: type1.


def open_container() -> Fd:
    """Opens /dev/vfio/vfio and checks its version."""
    container = _open(CONTAINER, _CONTAINER_REMEDIES)
    version = container.ioctl(lib.VFIO_GET_API_VERSION, "VFIO_GET_API_VERSION")
    if version != lib.VFIO_API_VERSION:
        container.close()
        raise KernelError(f"VFIO API version {version}", errno.ENOTSUP, "use a newer VMM")
    return container


def adopt(number: int, name: str) -> Fd:
    """Takes over a descriptor that is open already, as one that came over an exec."""
    return Fd(number, name)


def check_extension(container: Fd, extension: int) -> bool:
    return container.ioctl(lib.VFIO_CHECK_EXTENSION, "VFIO_CHECK_EXTENSION", extension) > 0


def updates_vaddr(container: Fd) -> bool:
    """Whether addresses of mappings can be changed; known only once the IOMMU is set."""
    return check_extension(container, lib.VFIO_UPDATE_VADDR)


def unmaps_all(container: Fd) -> bool:
    return check_extension(container, lib.VFIO_UNMAP_ALL)


def set_iommu(container: Fd) -> None:
    """Makes the container a type1 one; it must have a group."""
    for kind in (lib.VFIO_TYPE1v2_IOMMU, lib.VFIO_TYPE1_IOMMU):
        if check_extension(container, kind):
            try:
                container.ioctl(lib.VFIO_SET_IOMMU, "VFIO_SET_IOMMU", kind)
            except KernelError as error:
                remedy = _TYPE1_REMEDY if error.errno == errno.EPERM else ""
                raise KernelError(error.operation, error.errno, remedy) from None
            return
    raise KernelError(
        f"VFIO_SET_IOMMU on {container.name}: no type1 IOMMU",
        errno.ENODEV,
        "load module vfio_iommu_type1, and boot with the IOMMU on (intel_iommu=on)",
    )


def open_group(number: int, address: str) -> Fd:
    """Opens /dev/vfio/NUMBER, the IOMMU group of the device at `address`, and checks it.

    Raises KernelError saying how to bind the device, or which other devices of the group are in
    the way.
    """
    path = f"{DIRECTORY}/{number}"
    remedies = {
        errno.ENOENT: bind_remedy(address),
        errno.EBUSY: f"another process uses group {number}: end it",
        errno.EACCES: f"give yourself read and write access to {path}",
    }
    group = _open(path, remedies)
    status = ffi.new("struct vfio_group_status *", {"argsz": _size("vfio_group_status")})
    try:
        group.ioctl(lib.VFIO_GROUP_GET_STATUS, "VFIO_GROUP_GET_STATUS", status)
        if not status.flags & lib.VFIO_GROUP_FLAGS_VIABLE:
            raise KernelError(
                f"group {number} of {address} is not viable", errno.EPERM, viable_remedy(address)
            )
    except KernelError:
        group.close()
        raise
    return group


def set_container(group: Fd, container: Fd) -> None:
    """Puts the group into the container; closing all of the group's devices frees it again."""
    number = ffi.new("int *", container.number)
    group.ioctl(lib.VFIO_GROUP_SET_CONTAINER, "VFIO_GROUP_SET_CONTAINER", number)


def get_device_fd(group: Fd, address: str) -> Fd:
    """The device at `address`, which must be of the group; the kernel resets it."""
    name = ffi.new("char[]", address.encode())
    operation = "VFIO_GROUP_GET_DEVICE_FD"
    try:
        number = group.ioctl(lib.VFIO_GROUP_GET_DEVICE_FD, operation, name)
    except KernelError as error:
        remedies = {
            errno.ENODEV: bind_remedy(address),
            errno.EBUSY: f"another process uses {address}: end it",
        }
        raise KernelError(
            f"{operation} of {address} on {group.name}",
            error.errno,
            remedies.get(error.errno, ""),
        ) from None
    return Fd(number, address)


def map_dma(container: Fd, iova: int, size: int, host_address: int, readonly: bool = False) -> None:
    """Lets the container's devices reach `size` bytes at `host_address` at guest address `iova`."""
    flags = lib.VFIO_DMA_MAP_FLAG_READ | (0 if readonly else lib.VFIO_DMA_MAP_FLAG_WRITE)
    _map_dma(container, flags, iova, size, host_address)


def update_vaddr(container: Fd, iova: int, size: int, host_address: int) -> None:
    """Tells where the memory of a mapping is now, after `invalidate_vaddrs`."""
    _map_dma(container, lib.VFIO_DMA_MAP_FLAG_VADDR, iova, size, host_address)


def unmap_dma(container: Fd, iova: int, size: int) -> None:
    """The inverse of `map_dma`."""
    _unmap_dma(container, 0, iova, size)


def invalidate_vaddrs(container: Fd) -> None:
    """Says that no address of any mapping is valid any more; DMA goes on.

    The inverse is `update_vaddr` of every mapping.
    """
    flags = lib.VFIO_DMA_UNMAP_FLAG_VADDR | lib.VFIO_DMA_UNMAP_FLAG_ALL
    _unmap_dma(container, flags, 0, 0)


# The device: of a group, or as a character device of its own.


def open_cdev(path: str, address: str) -> Fd:
    """Opens /dev/vfio/devices/vfioN, which must be bound to an iommufd before it can be used."""
    remedies = {
        errno.ENOENT: bind_remedy(address),
        errno.EBUSY: f"another process uses {address}: end it",
        errno.EACCES: f"give yourself read and write access to {path}",
    }
    return Fd(_open(path, remedies).release(), address)


def bind_iommufd(device: Fd, iommufd: Fd) -> int:
    """Binds the device to the iommufd, for good; returns the device's id there."""
    bind = ffi.new("struct vfio_device_bind_iommufd *")
    bind.argsz = _size("vfio_device_bind_iommufd")
    bind.iommufd = iommufd.number
    operation = "VFIO_DEVICE_BIND_IOMMUFD"
    try:
        device.ioctl(lib.VFIO_DEVICE_BIND_IOMMUFD, operation, bind)
    except KernelError as error:
        remedies = {
            errno.EPERM: _TYPE1_REMEDY,
            errno.EINVAL: "the device is bound already, or a group of /dev/vfio has it",
            errno.EBUSY: viable_remedy(device.name),
        }
        text = f"{operation} on {device.name}"
        raise KernelError(text, error.errno, remedies.get(error.errno, "")) from None
    return int(bind.out_devid)


def attach_iommufd_pt(device: Fd, page_table: int) -> None:
    """Attaches the bound device to a hardware page table of its iommufd; its close detaches it."""
    attach = ffi.new("struct vfio_device_attach_iommufd_pt *", {"pt_id": page_table})
    attach.argsz = _size("vfio_device_attach_iommufd_pt")
    device.ioctl(lib.VFIO_DEVICE_ATTACH_IOMMUFD_PT, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", attach)


def set_triggers(device: Fd, index: int, start: int, eventfds: Sequence[int]) -> None:
    """Connects interrupts `start`… of an index with eventfds, -1 for none.

    The eventfds stay the caller's; the kernel keeps a reference of its own until `disable_irqs`.
    """
    _set_irqs(device, lib.VFIO_IRQ_SET_ACTION_TRIGGER, index, start, eventfds)


def set_unmask(device: Fd, index: int, eventfd: int) -> None:
    """Has `eventfd` unmask interrupt 0 of the index when it is written."""
    _set_irqs(device, lib.VFIO_IRQ_SET_ACTION_UNMASK, index, 0, (eventfd,))


def unmask(device: Fd, index: int) -> None:
    """Unmasks interrupt 0 of the index; if its line is still up, it comes again."""
    _set_irqs_plain(device, lib.VFIO_IRQ_SET_ACTION_UNMASK, index, 1)


def disable_irqs(device: Fd, index: int) -> None:
    """The inverse of `set_triggers`, for the whole index."""
    _set_irqs_plain(device, lib.VFIO_IRQ_SET_ACTION_TRIGGER, index, 0)


def reset(device: Fd) -> None:
    device.ioctl(lib.VFIO_DEVICE_RESET, "VFIO_DEVICE_RESET")


def read_region(device: Fd, region: RegionInfo, offset: int, size: int) -> int:
    """A little-endian value of `size` bytes; raises KernelError where it cannot be read."""
    return int.from_bytes(read_bytes(device, region, offset, size), "little")


def read_bytes(device: Fd, region: RegionInfo, offset: int, size: int) -> bytes:
    """Bytes of the region; raises KernelError where they cannot be read."""
    try:
        return os.pread(device.number, size, region.offset + offset).ljust(size, b"\0")
    except OSError as error:
        raise KernelError(f"read of {device.name} at {offset:#x}", error.errno or 0) from None


def write_region(device: Fd, region: RegionInfo, offset: int, size: int, value: int) -> None:
    try:
        os.pwrite(device.number, value.to_bytes(size, "little"), region.offset + offset)
    except OSError as error:
        raise KernelError(f"write to {device.name} at {offset:#x}", error.errno or 0) from None


def map_region(device: Fd, region: RegionInfo, offset: int, size: int) -> int:
    """Maps `size` bytes of the region from `offset` on; `unmap_region` is the inverse."""
    protection = (lib.PROT_READ if region.readable else 0) | (
        lib.PROT_WRITE if region.writable else 0
    )
    address = lib.mmap(
        ffi.NULL, size, protection, lib.MAP_SHARED, device.number, region.offset + offset
    )
    if address == ffi.cast("void *", -1):
        raise KernelError(f"mmap of {device.name} at {offset:#x}", ffi.errno)
    return int(ffi.cast("uintptr_t", address))


def unmap_region(address: int, size: int) -> None:
    lib.munmap(ffi.cast("void *", address), size)


def _open(path: str, remedies: dict[int, str]) -> Fd:
    try:
        return Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)
    except OSError as error:
        code = error.errno or 0
        raise KernelError(f"failed to open {path}", code, remedies.get(code, "")) from None


def _size(name: str) -> int:
    return ffi.sizeof(f"struct {name}")


def _map_dma(container: Fd, flags: int, iova: int, size: int, host_address: int) -> None:
    request = ffi.new("struct vfio_iommu_type1_dma_map *")
    request.argsz = _size("vfio_iommu_type1_dma_map")
    request.flags = flags
    request.vaddr, request.iova, request.size = host_address, iova, size
    operation = f"VFIO_IOMMU_MAP_DMA of {size:#x} bytes at {iova:#x}"
    try:
        container.ioctl(lib.VFIO_IOMMU_MAP_DMA, operation, request)
    except KernelError as error:
        remedy = memlock_remedy(size) if error.errno == errno.ENOMEM else ""
        raise KernelError(error.operation, error.errno, remedy) from None


def _unmap_dma(container: Fd, flags: int, iova: int, size: int) -> None:
    request = ffi.new("struct vfio_iommu_type1_dma_unmap *")
    request.argsz = _size("vfio_iommu_type1_dma_unmap")
    request.flags = flags
    request.iova, request.size = iova, size
    container.ioctl(lib.VFIO_IOMMU_UNMAP_DMA, "VFIO_IOMMU_UNMAP_DMA", request)


def _set_irqs(device: Fd, action: int, index: int, start: int, eventfds: Sequence[int]) -> None:
    data = ffi.new("int32_t[]", list(eventfds))
    request = ffi.new("struct vfio_irq_set *", {"data": ffi.sizeof(data)})
    request.argsz = _size("vfio_irq_set") + ffi.sizeof(data)
    request.flags = lib.VFIO_IRQ_SET_DATA_EVENTFD | action
    request.index, request.start, request.count = index, start, len(eventfds)
    ffi.memmove(request.data, data, ffi.sizeof(data))
    device.ioctl(lib.VFIO_DEVICE_SET_IRQS, f"VFIO_DEVICE_SET_IRQS of index {index}", request)


def _set_irqs_plain(device: Fd, action: int, index: int, count: int) -> None:
    request = ffi.new("struct vfio_irq_set *", {"data": 0})
    request.argsz = _size("vfio_irq_set")
    request.flags = lib.VFIO_IRQ_SET_DATA_NONE | action
    request.index, request.count = index, count
    device.ioctl(lib.VFIO_DEVICE_SET_IRQS, f"VFIO_DEVICE_SET_IRQS of index {index}", request)
