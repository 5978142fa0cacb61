"""What VFIO tells of a device: itself, its regions and its interrupts (linux/vfio.h)."""

from __future__ import annotations

import errno

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cpr.uapi.fd import Fd


class DeviceInfo:
    """VFIO_DEVICE_GET_INFO: what the device can do, and how many regions and IRQ indices it has."""

    __slots__ = ("irqs", "is_pci", "regions", "resets")

    def __init__(self, is_pci: bool, resets: bool, regions: int, irqs: int) -> None:
        self.is_pci = is_pci
        self.resets = resets
        self.regions = regions
        self.irqs = irqs


class RegionInfo:
    """VFIO_DEVICE_GET_REGION_INFO: a region's place in the device's descriptor, in bytes.

    `areas` are the (offset, size) inside the region that may be mmapped.
    """

    __slots__ = ("areas", "offset", "readable", "size", "writable")

    def __init__(
        self,
        offset: int,
        size: int,
        readable: bool,
        writable: bool,
        areas: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.offset = offset
        self.size = size
        self.readable = readable
        self.writable = writable
        self.areas = tuple(areas)


class IrqInfo:
    """VFIO_DEVICE_GET_IRQ_INFO.

    `count` interrupts in the index, 0 where there is none.  `resizes`: some may be added while
    others are enabled.
    """

    __slots__ = ("count", "eventfd", "resizes")

    def __init__(self, count: int, eventfd: bool, resizes: bool) -> None:
        self.count = count
        self.eventfd = eventfd
        self.resizes = resizes


def device_info(device: Fd) -> DeviceInfo:
    info = ffi.new("struct vfio_device_info *", {"argsz": ffi.sizeof("struct vfio_device_info")})
    device.ioctl(lib.VFIO_DEVICE_GET_INFO, "VFIO_DEVICE_GET_INFO", info)
    return DeviceInfo(
        bool(info.flags & lib.VFIO_DEVICE_FLAGS_PCI),
        bool(info.flags & lib.VFIO_DEVICE_FLAGS_RESET),
        info.num_regions,
        info.num_irqs,
    )


def region_info(device: Fd, index: int) -> RegionInfo:
    """What the kernel tells of region `index`; of a size of 0 where there is no such region."""
    size = ffi.sizeof("struct vfio_region_info")
    while True:
        room = ffi.new("char[]", size)
        info = ffi.cast("struct vfio_region_info *", room)
        info.argsz = size
        info.index = index
        device.ioctl(lib.VFIO_DEVICE_GET_REGION_INFO, "VFIO_DEVICE_GET_REGION_INFO", info)
        if info.argsz <= size:
            break
        size = info.argsz  # it has capabilities, and says how much room they take
    flags = info.flags
    areas: list[tuple[int, int]] = []
    if flags & lib.VFIO_REGION_INFO_FLAG_MMAP:
        sparse = None
        if flags & lib.VFIO_REGION_INFO_FLAG_CAPS:
            sparse = _sparse_areas(ffi.buffer(room), info)
        areas = [(0, info.size)] if sparse is None else sparse
    return RegionInfo(
        info.offset,
        info.size,
        bool(flags & lib.VFIO_REGION_INFO_FLAG_READ),
        bool(flags & lib.VFIO_REGION_INFO_FLAG_WRITE),
        areas,
    )


def irq_info(device: Fd, index: int) -> IrqInfo:
    info = ffi.new(
        "struct vfio_irq_info *", {"argsz": ffi.sizeof("struct vfio_irq_info"), "index": index}
    )
    try:
        device.ioctl(lib.VFIO_DEVICE_GET_IRQ_INFO, "VFIO_DEVICE_GET_IRQ_INFO", info)
    except KernelError as error:
        if error.errno == errno.EINVAL:  # the device has no such index
            return IrqInfo(0, False, False)
        raise
    return IrqInfo(
        info.count,
        bool(info.flags & lib.VFIO_IRQ_INFO_EVENTFD),
        not info.flags & lib.VFIO_IRQ_INFO_NORESIZE,
    )


def _sparse_areas(data: Any, info: Any) -> list[tuple[int, int]] | None:
    """The areas of the sparse-mmap capability, or None where the region has none."""
    offset = info.cap_offset
    while offset:
        header = ffi.from_buffer("struct vfio_info_cap_header *", memoryview(data)[offset:])
        if header.id == lib.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
            sparse = ffi.cast("struct vfio_region_info_cap_sparse_mmap *", header)
            return [
                (sparse.areas[i].offset, sparse.areas[i].size)
                for i in range(sparse.nr_areas)
                if sparse.areas[i].size
            ]
        offset = header.next
    return None
