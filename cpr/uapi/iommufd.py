"""IOMMUFD's ioctls as typed functions (Documentation/userspace-api/iommufd.rst).

Descriptors stay the caller's.  Every failure is a KernelError that names the ioctl, the iommufd
and what to do about it.
"""

from __future__ import annotations

import errno
import os

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError
from cpr.uapi.fd import Fd
from cpr.uapi.memlock import memlock_remedy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEVICE = "/dev/iommu"

_OPEN_REMEDIES = {
    errno.ENOENT: "this host's kernel has no CONFIG_IOMMUFD, or module iommufd is not loaded; "
    "leave out iommufd= for VFIO's type1",
    errno.ENODEV: "load module iommufd",
    errno.EACCES: f"give yourself read and write access to {DEVICE}",
}


def open_device() -> Fd:
    """Opens /dev/iommu; the caller owns it."""
    try:
        return Fd(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC), DEVICE)
    except OSError as error:
        code = error.errno or 0
        remedy = _OPEN_REMEDIES.get(code, "")
        raise KernelError(f"failed to open {DEVICE}", code, remedy) from None


def adopt(number: int) -> Fd:
    """Takes over an iommufd that is open already."""
    return Fd(number, DEVICE)


def alloc_ioas(iommufd: Fd) -> int:
    """Allocates an I/O address space; returns its id.  `destroy` is the inverse."""
    request = _request("iommu_ioas_alloc")
    iommufd.ioctl(lib.IOMMU_IOAS_ALLOC, "IOMMU_IOAS_ALLOC", request)
    return int(request.out_ioas_id)


def alloc_hwpt(iommufd: Fd, device_id: int, ioas_id: int) -> int:
    """Allocates a hardware page table for a device over an IOAS; returns its id."""
    request = _request("iommu_hwpt_alloc")
    request.dev_id, request.pt_id = device_id, ioas_id
    iommufd.ioctl(lib.IOMMU_HWPT_ALLOC, "IOMMU_HWPT_ALLOC", request)
    return int(request.out_hwpt_id)


def destroy(iommufd: Fd, object_id: int) -> None:
    request = _request("iommu_destroy")
    request.id = object_id
    iommufd.ioctl(lib.IOMMU_DESTROY, "IOMMU_DESTROY", request)


def map_file(
    iommufd: Fd, ioas_id: int, iova: int, size: int, fd: int, start: int, readonly: bool = False
) -> None:
    """Maps `size` bytes of a memfd from `start` on at guest address `iova`.

    Only such mappings can go to another process.  ENOTTY where the kernel is older than 6.13.
    """
    request = _request("iommu_ioas_map_file")
    request.flags = _flags(readonly)
    request.ioas_id, request.iova, request.length = ioas_id, iova, size
    request.fd, request.start = fd, start
    _map(iommufd, lib.IOMMU_IOAS_MAP_FILE, "IOMMU_IOAS_MAP_FILE", request)


def map_memory(
    iommufd: Fd, ioas_id: int, iova: int, size: int, host_address: int, readonly: bool = False
) -> None:
    """Maps `size` bytes of this process's memory at guest address `iova`."""
    request = _request("iommu_ioas_map")
    request.flags = _flags(readonly)
    request.ioas_id, request.iova, request.length = ioas_id, iova, size
    request.user_va = host_address
    _map(iommufd, lib.IOMMU_IOAS_MAP, "IOMMU_IOAS_MAP", request)


def unmap(iommufd: Fd, ioas_id: int, iova: int, size: int) -> None:
    """The inverse of `map_file` and `map_memory`."""
    request = _request("iommu_ioas_unmap")
    request.ioas_id, request.iova, request.length = ioas_id, iova, size
    iommufd.ioctl(lib.IOMMU_IOAS_UNMAP, "IOMMU_IOAS_UNMAP", request)


def change_process(iommufd: Fd, locked: int) -> None:
    """Makes this process the one whose locked memory the mappings count in; `locked` bytes.

    Nothing changes where it fails: ENOTTY before Linux 6.13, EINVAL with mappings of memory that
    is no memfd's, ENOMEM where this process may not lock as much (the kernel counts it here before
    it takes it off there).
    """
    operation = "IOMMU_IOAS_CHANGE_PROCESS"
    try:
        iommufd.ioctl(
            lib.IOMMU_IOAS_CHANGE_PROCESS, operation, _request("iommu_ioas_change_process")
        )
    except KernelError as error:
        remedies = {
            errno.ENOTTY: "use Linux 6.13 or newer, or leave out iommufd= for VFIO's type1",
            errno.EINVAL: "give all guest RAM a memfd: memory-backend-memfd and aux-ram-share=on",
        }
        remedy = remedies.get(error.errno, "")
        if error.errno == errno.ENOMEM:
            remedy = memlock_remedy(2 * locked)
        raise KernelError(error.operation, error.errno, remedy) from None


def _request(name: str) -> Any:
    request = ffi.new(f"struct {name} *")
    request.size = ffi.sizeof(f"struct {name}")
    return request


def _flags(readonly: bool) -> int:
    flags: int = lib.IOMMU_IOAS_MAP_FIXED_IOVA | lib.IOMMU_IOAS_MAP_READABLE
    return flags if readonly else flags | lib.IOMMU_IOAS_MAP_WRITEABLE


def _map(iommufd: Fd, request_code: int, operation: str, request: Any) -> None:
    operation = f"{operation} of {request.length:#x} bytes at {request.iova:#x}"
    try:
        iommufd.ioctl(request_code, operation, request)
    except KernelError as error:
        remedy = memlock_remedy(request.length) if error.errno == errno.ENOMEM else ""
        raise KernelError(error.operation, error.errno, remedy) from None
