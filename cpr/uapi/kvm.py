"""KVM's ioctls as typed functions; the layouts are the kernel's own (linux/kvm.h)."""

from __future__ import annotations

import errno
import os

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError
from cpr.uapi.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEVICE = "/dev/kvm"

REQUIRED_CAPABILITIES = (
    ("KVM_CAP_USER_MEMORY", lib.KVM_CAP_USER_MEMORY),
    ("KVM_CAP_IRQCHIP", lib.KVM_CAP_IRQCHIP),
    ("KVM_CAP_PIT2", lib.KVM_CAP_PIT2),
    ("KVM_CAP_PIT_STATE2", lib.KVM_CAP_PIT_STATE2),
    ("KVM_CAP_MP_STATE", lib.KVM_CAP_MP_STATE),
    ("KVM_CAP_EXT_CPUID", lib.KVM_CAP_EXT_CPUID),
    ("KVM_CAP_VCPU_EVENTS", lib.KVM_CAP_VCPU_EVENTS),
    ("KVM_CAP_DEBUGREGS", lib.KVM_CAP_DEBUGREGS),
    ("KVM_CAP_XSAVE", lib.KVM_CAP_XSAVE),
    ("KVM_CAP_XCRS", lib.KVM_CAP_XCRS),
    ("KVM_CAP_ADJUST_CLOCK", lib.KVM_CAP_ADJUST_CLOCK),
    ("KVM_CAP_IMMEDIATE_EXIT", lib.KVM_CAP_IMMEDIATE_EXIT),
    ("KVM_CAP_SREGS2", lib.KVM_CAP_SREGS2),
    ("KVM_CAP_READONLY_MEM", lib.KVM_CAP_READONLY_MEM),
)

_ACCESS_REMEDIES = {
    errno.ENOENT: "this host has no KVM: load kvm-intel or kvm-amd, or use -accel tcg",
    errno.ENXIO: "this host has no KVM: load kvm-intel or kvm-amd, or use -accel tcg",
    errno.EACCES: "add yourself to group kvm (usermod -aG kvm $USER), or use -accel tcg",
    errno.EPERM: "add yourself to group kvm (usermod -aG kvm $USER), or use -accel tcg",
}


def open_device() -> Fd:
    """Opens /dev/kvm (the caller owns it) and checks version and capabilities.

    Raises KernelError that says what is missing: the device, the permission, or a capability.
    """
    try:
        number = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedy = _ACCESS_REMEDIES.get(error.errno or 0, "use -accel tcg")
        raise KernelError(
            f"Could not access KVM kernel module {DEVICE}", error.errno or 0, remedy
        ) from None
    device = Fd(number, DEVICE)
    try:
        version = device.ioctl(lib.KVM_GET_API_VERSION, "KVM_GET_API_VERSION")
        if version != lib.KVM_API_VERSION:
            raise KernelError(f"KVM API version {version}", errno.ENOTSUP, "use -accel tcg")
        for name, number in REQUIRED_CAPABILITIES:
            if check_extension(device, number) <= 0:
                raise KernelError(f"{DEVICE} lacks {name}", errno.ENOTSUP, "use -accel tcg")
    except KernelError:
        device.close()
        raise
    return device


def check_extension(fd: Fd, capability: int) -> int:
    """The value of a capability: 0 where the kernel does not have it."""
    return fd.ioctl(lib.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", capability)


def create_vm(device: Fd) -> Fd:
    return Fd(device.ioctl(lib.KVM_CREATE_VM, "KVM_CREATE_VM"), "kvm-vm")


def vcpu_mmap_size(device: Fd) -> int:
    """Bytes of a vCPU's kvm_run area."""
    return device.ioctl(lib.KVM_GET_VCPU_MMAP_SIZE, "KVM_GET_VCPU_MMAP_SIZE")


def create_vcpu(vm: Fd, index: int) -> Fd:
    return Fd(vm.ioctl(lib.KVM_CREATE_VCPU, "KVM_CREATE_VCPU", index), f"kvm-vcpu:{index}")


def map_run(vcpu: Fd, size: int) -> Any:
    """Maps the kvm_run area of `size` bytes; `unmap_run` is the inverse."""
    address = lib.mmap(
        ffi.NULL, size, lib.PROT_READ | lib.PROT_WRITE, lib.MAP_SHARED, vcpu.number, 0
    )
    if address == ffi.cast("void *", -1):
        raise KernelError(f"mmap of kvm_run on {vcpu.name}", ffi.errno)
    return ffi.cast("struct kvm_run *", address)


def unmap_run(run: Any, size: int) -> None:
    lib.munmap(run, size)


def set_memory_region(
    vm: Fd, slot: int, flags: int, address: int, size: int, host_address: int
) -> None:
    """Sets memslot `slot`; `size` 0 deletes it."""
    region = ffi.new("struct kvm_userspace_memory_region *")
    region.slot = slot
    region.flags = flags
    region.guest_phys_addr = address
    region.memory_size = size
    region.userspace_addr = host_address
    vm.ioctl(lib.KVM_SET_USER_MEMORY_REGION, "KVM_SET_USER_MEMORY_REGION", region)


def get_dirty_log(vm: Fd, slot: int, bitmap: bytearray) -> None:
    """Takes memslot `slot`'s dirty log: the pages that were written since it was last taken.

    `bitmap` has a bit for each page of the slot, in whole 64-bit words.  The pages are
    write-protected again before this returns (Documentation/virt/kvm/api.rst, 4.8).
    """
    words = ffi.from_buffer("uint64_t[]", bitmap, require_writable=True)
    log = ffi.new("struct kvm_dirty_log *")
    log.slot = slot
    log.dirty_bitmap = words
    vm.ioctl(lib.KVM_GET_DIRTY_LOG, "KVM_GET_DIRTY_LOG", log)


def get_struct(fd: Fd, name: str, operation: str, request: int) -> Any:
    """Reads one fixed-size kernel struct, returned as an owning cdata pointer."""
    struct = ffi.new(f"struct {name} *")
    fd.ioctl(request, operation, struct)
    return struct


def supported_cpuid(device: Fd) -> Any:
    """The kvm_cpuid2 of all that this host can give a guest."""
    room = 256
    cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
    device.ioctl(lib.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID", cpuid)
    return cpuid


def msr_indices(device: Fd) -> list[int]:
    """KVM_GET_MSR_INDEX_LIST: the MSRs that make up a vCPU's state on this host."""
    room = 1024
    msrs = ffi.new("struct kvm_msr_list *", {"nmsrs": room, "indices": room})
    device.ioctl(lib.KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST", msrs)
    return [msrs.indices[i] for i in range(msrs.nmsrs)]


def get_msrs(vcpu: Fd, indices: list[int]) -> dict[int, int]:
    """Reads MSRs by index; one that the kernel refuses is left out."""
    values: dict[int, int] = {}
    wanted = list(indices)
    while wanted:
        msrs = _msr_array([(index, 0) for index in wanted])
        done = vcpu.ioctl(lib.KVM_GET_MSRS, "KVM_GET_MSRS", msrs)
        for i in range(done):
            values[msrs.entries[i].index] = msrs.entries[i].data
        wanted = wanted[done + 1 :]
    return values


def set_msrs(vcpu: Fd, entries: list[tuple[int, int]]) -> list[int]:
    """Writes (index, data) in order and returns the indices that the kernel refused."""
    refused: list[int] = []
    while entries:
        msrs = _msr_array(entries)
        done = vcpu.ioctl(lib.KVM_SET_MSRS, "KVM_SET_MSRS", msrs)
        if done < len(entries):
            refused.append(entries[done][0])
        entries = entries[done + 1 :]
    return refused


def _msr_array(entries: list[tuple[int, int]]) -> Any:
    msrs = ffi.new("struct kvm_msrs *", {"nmsrs": len(entries), "entries": len(entries)})
    for i, (index, data) in enumerate(entries):
        msrs.entries[i].index = index
        msrs.entries[i].data = data
    return msrs
