"""KVM's ioctls as typed functions; the layouts are the kernel's own (linux/kvm.h)."""

from __future__ import annotations

import errno
import os
from array import array

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError
from cpr.uapi.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
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


def tell_stopped(vcpu: Fd) -> None:
    """Has KVM's clock tell the guest that it stood still; nothing happens where it has none."""
    try:
        vcpu.ioctl(lib.KVM_KVMCLOCK_CTRL, "KVM_KVMCLOCK_CTRL")
    except KernelError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise


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


class StateStruct:
    """A part of a VM's or a vCPU's state: a struct that KVM_GET_… reads and KVM_SET_… writes."""

    __slots__ = ("_get", "_name", "_set", "kind")

    def __init__(self, kind: str, name: str) -> None:
        """`kind` is the struct's name in C, `name` what comes after KVM_GET_."""
        self.kind = kind
        self._name = name
        self._get: int = getattr(lib, f"KVM_GET_{name}")
        self._set: int = getattr(lib, f"KVM_SET_{name}")

    def name(self, reading: bool) -> str:
        return f"KVM_{'GET' if reading else 'SET'}_{self._name}"

    def request(self, reading: bool) -> int:
        return self._get if reading else self._set

    def new(self) -> Any:
        """An empty one, as an owning cdata pointer."""
        return ffi.new(f"struct {self.kind} *")

    def get(self, fd: Fd) -> Any:
        """Reads it, into a new one."""
        struct = self.new()
        self.read(fd, struct)
        return struct

    def read(self, fd: Fd, struct: Any) -> None:
        fd.ioctl(self._get, self.name(True), struct)

    def set(self, fd: Fd, struct: Any) -> None:
        fd.ioctl(self._set, self.name(False), struct)


MSRS = StateStruct("kvm_msrs", "MSRS")


class Calls:
    """A list of ioctls that are called in their order, in one go."""

    def __init__(self, fd: Fd, reading: bool, parts: Sequence[tuple[StateStruct, Any]]) -> None:
        """Each struct is read from `fd`, which stays the caller's, or written, at its pointer."""
        self._fd, self._reading, self._parts = fd, reading, parts
        self._calls = ffi.new("struct cpr_ioctl[]", len(parts))
        for call, (struct, pointer) in zip(self._calls, parts, strict=True):
            call.fd, call.request, call.argument = fd.number, struct.request(reading), pointer

    def run(self) -> None:
        """Raises KernelError for the first that fails, after which none is called."""
        done = lib.cpr_ioctls(self._calls, len(self._parts))
        if done < len(self._parts):
            name = self._parts[done][0].name(self._reading)
            raise KernelError(f"{name} on {self._fd.name}", -self._calls[done].result)

    def result(self, struct: StateStruct) -> int:
        """What the call for `struct` has returned in the last run."""
        place = next(i for i, (each, _) in enumerate(self._parts) if each is struct)
        return int(self._calls[place].result)


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
        msrs = msr_array([(index, 0) for index in wanted])
        done = vcpu.ioctl(lib.KVM_GET_MSRS, "KVM_GET_MSRS", msrs)
        words = memoryview(ffi.buffer(msrs.entries)).cast("B").cast("Q")[: 2 * done]
        values.update(zip(words[::2].tolist(), words[1::2].tolist(), strict=True))
        wanted = wanted[done + 1 :]
    return values


def set_msrs(vcpu: Fd, entries: list[tuple[int, int]]) -> list[int]:
    """Writes (index, data) in order and returns the indices that the kernel refused."""
    refused: list[int] = []
    while entries:
        msrs = msr_array(entries)
        done = vcpu.ioctl(lib.KVM_SET_MSRS, "KVM_SET_MSRS", msrs)
        if done < len(entries):
            refused.append(entries[done][0])
        entries = entries[done + 1 :]
    return refused


def msr_array(entries: list[tuple[int, int]]) -> Any:
    """The kvm_msrs of (index, data) entries."""
    msrs = ffi.new("struct kvm_msrs *", {"nmsrs": len(entries), "entries": len(entries)})
    # struct kvm_msr_entry is u32 index, u32 reserved, u64 data: two words of this host's order.
    ffi.buffer(msrs.entries)[:] = array(
        "Q", [word for entry in entries for word in entry]
    ).tobytes()
    return msrs


class TscOffset:
    """What a vCPU's TSC is ahead of the host's, modulo 2^64."""

    def __init__(self, vcpu: Fd) -> None:
        """`vcpu` stays the caller's.  Raises KernelError before Linux 5.16."""
        self._vcpu = vcpu
        self._value = ffi.new("uint64_t *")
        self._attribute = ffi.new("struct kvm_device_attr *", {"group": lib.KVM_VCPU_TSC_CTRL})
        self._attribute.attr = lib.KVM_VCPU_TSC_OFFSET
        self._attribute.addr = int(ffi.cast("uintptr_t", self._value))
        self.get()

    def get(self) -> int:
        self._call(lib.KVM_GET_DEVICE_ATTR, "KVM_GET_DEVICE_ATTR of the TSC's offset")
        return int(self._value[0])

    def set(self, offset: int) -> None:
        self._value[0] = offset
        self._call(lib.KVM_SET_DEVICE_ATTR, "KVM_SET_DEVICE_ATTR of the TSC's offset")

    def _call(self, request: int, operation: str) -> None:
        self._vcpu.ioctl(request, operation, self._attribute)


# Interrupts by eventfd, and VFIO.


def assign_irqfd(vm: Fd, gsi: int, eventfd: int, resamplefd: int = -1) -> None:
    """Has a write to `eventfd` raise `gsi`.

    With `resamplefd` the interrupt is level-triggered: it stays up until the guest has ended it,
    which writes resamplefd.  Both stay the caller's.  If eventfd has been written before, the
    interrupt is raised at once, and the eventfd keeps its count.
    """
    _irqfd(vm, gsi, eventfd, resamplefd, 0)


def deassign_irqfd(vm: Fd, gsi: int, eventfd: int) -> None:
    """The inverse of `assign_irqfd`; when it returns, no interrupt comes any more."""
    _irqfd(vm, gsi, eventfd, -1, lib.KVM_IRQFD_FLAG_DEASSIGN)


def assign_ioeventfd(vm: Fd, address: int, size: int, eventfd: int) -> None:
    """Has a guest's write of `size` bytes to `address` write `eventfd`, which stays the caller's,
    instead of ending KVM_RUN.
    """
    _ioeventfd(vm, address, size, eventfd, 0)


def deassign_ioeventfd(vm: Fd, address: int, size: int, eventfd: int) -> None:
    """The inverse of `assign_ioeventfd`."""
    _ioeventfd(vm, address, size, eventfd, lib.KVM_IOEVENTFD_FLAG_DEASSIGN)


def set_gsi_routing(
    vm: Fd, pins: list[tuple[int, int, int]], messages: list[tuple[int, int, int]]
) -> None:
    """Replaces the whole table: (gsi, irqchip, pin) and (gsi, MSI address, MSI data)."""
    count = len(pins) + len(messages)
    table = ffi.new("struct kvm_irq_routing *", {"nr": count, "entries": count})
    for i, (gsi, chip, pin) in enumerate(pins):
        entry = table.entries[i]
        entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_IRQCHIP
        entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
    for i, (gsi, address, data) in enumerate(messages, len(pins)):
        entry = table.entries[i]
        entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_MSI
        entry.u.msi.address_lo, entry.u.msi.address_hi = address & 0xFFFFFFFF, address >> 32
        entry.u.msi.data = data
    vm.ioctl(lib.KVM_SET_GSI_ROUTING, "KVM_SET_GSI_ROUTING", table)


def signal_msi(vm: Fd, address: int, data: int) -> None:
    """One for which there is no APIC vanishes (EPERM of KVM_SIGNAL_MSI).  Raises KernelError."""
    message = ffi.new("struct kvm_msi *", {"address_lo": address & 0xFFFFFFFF, "data": data})
    message.address_hi = address >> 32
    try:
        vm.ioctl(lib.KVM_SIGNAL_MSI, "KVM_SIGNAL_MSI", message)
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise


def create_vfio_device(vm: Fd) -> Fd:
    """The KVM-VFIO device, which tells VFIO of the VM that its devices are for."""
    request = ffi.new("struct kvm_create_device *", {"type": lib.KVM_DEV_TYPE_VFIO})
    vm.ioctl(lib.KVM_CREATE_DEVICE, "KVM_CREATE_DEVICE of type VFIO", request)
    return Fd(int(request.fd), "kvm-vfio")


def add_vfio_file(vfio: Fd, fd: int) -> None:
    """Registers a VFIO group or a VFIO device; `delete_vfio_file` is the inverse."""
    _vfio_file(vfio, fd, lib.KVM_DEV_VFIO_GROUP_ADD, "KVM_DEV_VFIO_FILE_ADD")


def delete_vfio_file(vfio: Fd, fd: int) -> None:
    _vfio_file(vfio, fd, lib.KVM_DEV_VFIO_GROUP_DEL, "KVM_DEV_VFIO_FILE_DEL")


def _irqfd(vm: Fd, gsi: int, eventfd: int, resamplefd: int, flags: int) -> None:
    request = ffi.new("struct kvm_irqfd *", {"fd": eventfd, "gsi": gsi, "flags": flags})
    if resamplefd >= 0:
        request.flags |= lib.KVM_IRQFD_FLAG_RESAMPLE
        request.resamplefd = resamplefd
    vm.ioctl(lib.KVM_IRQFD, f"KVM_IRQFD of GSI {gsi}", request)


def _ioeventfd(vm: Fd, address: int, size: int, eventfd: int, flags: int) -> None:
    request = ffi.new("struct kvm_ioeventfd *", {"addr": address, "len": size, "flags": flags})
    request.fd = eventfd
    vm.ioctl(lib.KVM_IOEVENTFD, f"KVM_IOEVENTFD at {address:#x}", request)


def _vfio_file(vfio: Fd, fd: int, attribute: int, operation: str) -> None:
    number = ffi.new("int32_t *", fd)
    request = ffi.new("struct kvm_device_attr *", {"group": lib.KVM_DEV_VFIO_GROUP})
    request.attr = attribute
    request.addr = int(ffi.cast("uintptr_t", number))
    vfio.ioctl(lib.KVM_SET_DEVICE_ATTR, operation, request)
