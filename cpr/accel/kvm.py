"""The KVM accelerator: a VM with the in-kernel irqchip and PIT, and real vCPUs.

The order in which things are made matters: memslots before the irqchip and the PIT, because a
memslot that is set after them waits for a grace period (7 ms instead of 0.07 ms).
"""

from __future__ import annotations

import errno
import sys

from cpr._native._cpr import ffi, lib
from cpr.accel import base, kvm_state
from cpr.accel.kvm_exit import serve
from cpr.errors import KernelError
from cpr.uapi import kvm
from cpr.uapi.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.base import Bus
    from cpr.accel.kvm_interrupts import KvmInterrupts

# Three pages for KVM's own TSS and one for its identity map, below the BIOS, as on every PC VMM.
IDENTITY_MAP_ADDRESS = 0xFEFFC000
TSS_ADDRESS = 0xFEFFD000

# What devices need that raise interrupts by eventfd.  KVM_CAP_DEVICE_CTRL is not among them: older
# kernels have the devices on x86 and do not say so.
IRQFD_CAPABILITIES = (
    ("KVM_CAP_IRQ_ROUTING", lib.KVM_CAP_IRQ_ROUTING),
    ("KVM_CAP_IRQFD", lib.KVM_CAP_IRQFD),
    ("KVM_CAP_IRQFD_RESAMPLE", lib.KVM_CAP_IRQFD_RESAMPLE),
    ("KVM_CAP_SIGNAL_MSI", lib.KVM_CAP_SIGNAL_MSI),
)
PAGE_SIZE = 4096
BITMAP_ALIGNMENT = 64 * PAGE_SIZE  # what a 64-bit word of a dirty log is for

CPUID_APIC_ID_LEAF = 1
CPUID_TOPOLOGY_LEAVES = (0xB, 0x1F)


class KvmInternalError(KernelError):
    """KVM cannot go on with this guest; the VM stops in runstate internal-error."""

    def __init__(self, text: str) -> None:
        super().__init__(text, errno.EIO, "the guest is stopped and can still be examined")


class KvmVCpu(base.VCpu):
    """One KVM vCPU; owns its descriptor and its kvm_run area."""

    def __init__(self, accel: KvmAccelerator, index: int) -> None:
        self.index = index
        self._accel = accel
        self._run_size = accel.run_size
        self._cpuid: Any = None
        self._thread = 0
        self._fd = kvm.create_vcpu(accel.vm, index)
        self._run = kvm.map_run(self._fd, self._run_size)
        self._exit = ffi.new("struct cpr_exit *")
        self._fd.ioctl(lib.KVM_SET_CPUID2, "KVM_SET_CPUID2", self.cpuid)

    @property
    def cpuid(self) -> Any:
        """The kvm_cpuid2 that the guest sees."""
        if self._cpuid is None:
            self._cpuid = self._create_cpuid()
        return self._cpuid

    def _create_cpuid(self) -> Any:
        cpuid = kvm.supported_cpuid(self._accel.device)
        for i in range(cpuid.nent):
            entry = cpuid.entries[i]
            if entry.function == CPUID_APIC_ID_LEAF:
                entry.ebx = (entry.ebx & 0x00FFFFFF) | self.index << 24
            elif entry.function in CPUID_TOPOLOGY_LEAVES:
                entry.edx = self.index
        return cpuid

    def run(self, bus: Bus) -> str:
        exit_ = self._exit
        self._thread = lib.cpr_vcpu_thread_enter()
        try:
            while True:
                error = int(lib.cpr_kvm_run(self._fd.number, self._run, exit_))
                if error == -errno.EINTR:
                    lib.cpr_kvm_set_immediate_exit(self._run, 0)
                    return base.KICKED
                if error:
                    raise KernelError(f"KVM_RUN on vCPU {self.index}", -error)
                reason = exit_.reason
                if reason in (lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO):
                    serve(exit_, bus)
                elif reason == lib.KVM_EXIT_SHUTDOWN:
                    return base.SHUTDOWN
                elif reason == lib.KVM_EXIT_HLT:
                    continue
                else:
                    raise self._internal_error(reason)
        finally:
            self._thread = 0

    def _internal_error(self, reason: int) -> KvmInternalError:
        exit_ = self._exit
        if reason == lib.KVM_EXIT_INTERNAL_ERROR:
            return KvmInternalError(f"KVM internal error. Suberror: {exit_.suberror}")
        if reason == lib.KVM_EXIT_FAIL_ENTRY:
            return KvmInternalError(f"KVM: entry failed, hardware error {exit_.hardware:#x}")
        return KvmInternalError(f"KVM: unknown exit reason {reason} on vCPU {self.index}")

    def kick(self) -> None:
        lib.cpr_kvm_set_immediate_exit(self._run, 1)
        thread = self._thread
        if thread:
            lib.cpr_vcpu_thread_kick(thread)

    def get_state(self) -> dict:
        return kvm_state.get_vcpu(self._fd, self._accel.msr_indices())

    def set_state(self, state: dict) -> None:
        refused = kvm_state.set_vcpu(self._fd, state)
        for index in refused:
            print(
                f"warning: KVM refused MSR {index:#x} of vCPU {self.index}; it keeps its value",
                file=sys.stderr,
            )

    @property
    def fd(self) -> Fd:
        """The vCPU's descriptor; it stays the vCPU's."""
        return self._fd

    def close(self) -> None:
        kvm.unmap_run(self._run, self._run_size)
        self._fd.close()


class Memslot:
    """A range of guest-physical addresses, its memslot's number and flags (KVM_MEM_…)."""

    __slots__ = ("address", "flags", "host_address", "number", "size")

    def __init__(self, number: int, address: int, size: int, host_address: int, flags: int) -> None:
        self.number = number
        self.address = address
        self.size = size
        self.host_address = host_address
        self.flags = flags


class KvmAccelerator(base.Accelerator):
    """One KVM VM; owns /dev/kvm and the VM descriptor."""

    name = "kvm"
    kernel_irqchip = True
    dirty_log = True

    def __init__(self) -> None:
        self.vcpus: list[KvmVCpu] = []
        self._slots: dict[tuple[int, int], Memslot] = {}
        self._interrupts: KvmInterrupts | None = None
        self._msr_indices: list[int] | None = None
        self.device = kvm.open_device()
        try:
            self.vm = kvm.create_vm(self.device)
        except KernelError:
            self.device.close()
            raise
        self.run_size = kvm.vcpu_mmap_size(self.device)
        self.vm.ioctl(lib.KVM_SET_TSS_ADDR, "KVM_SET_TSS_ADDR", TSS_ADDRESS)
        identity = ffi.new("uint64_t *", IDENTITY_MAP_ADDRESS)
        self.vm.ioctl(lib.KVM_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR", identity)
        lib.cpr_kick_install()

    def map_ram(self, address: int, size: int, host_address: int, readonly: bool = False) -> None:
        used = {slot.number for slot in self._slots.values()}
        number = next(number for number in range(len(used) + 1) if number not in used)
        flags = lib.KVM_MEM_READONLY if readonly else 0
        slot = Memslot(number, address, size, host_address, flags)
        self._set_slot(slot)
        self._slots[address, size] = slot

    def unmap_ram(self, address: int, size: int) -> None:
        slot = self._slots.pop((address, size))
        kvm.set_memory_region(self.vm, slot.number, 0, address, 0, 0)

    def _set_slot(self, slot: Memslot) -> None:
        kvm.set_memory_region(
            self.vm, slot.number, slot.flags, slot.address, slot.size, slot.host_address
        )

    def start_dirty_log(self) -> None:
        try:
            for slot in self._slots.values():
                if not slot.flags & lib.KVM_MEM_READONLY:
                    slot.flags |= lib.KVM_MEM_LOG_DIRTY_PAGES
                    self._set_slot(slot)
        except KernelError:
            self.stop_dirty_log()
            raise

    def stop_dirty_log(self) -> None:
        for slot in self._slots.values():
            if slot.flags & lib.KVM_MEM_LOG_DIRTY_PAGES:
                slot.flags &= ~lib.KVM_MEM_LOG_DIRTY_PAGES
                self._set_slot(slot)

    def take_dirty_log(self, address: int, size: int) -> bytearray:
        words = (size + BITMAP_ALIGNMENT - 1) // BITMAP_ALIGNMENT
        bitmap = bytearray(words * 8)
        kvm.get_dirty_log(self.vm, self._slots[address, size].number, bitmap)
        return bitmap

    def create_irqchip(self) -> None:
        self.vm.ioctl(lib.KVM_CREATE_IRQCHIP, "KVM_CREATE_IRQCHIP")
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        self.vm.ioctl(lib.KVM_CREATE_PIT2, "KVM_CREATE_PIT2", config)

    def create_vcpu(self, index: int) -> KvmVCpu:
        self.vcpus.append(KvmVCpu(self, index))
        return self.vcpus[-1]

    def msr_indices(self) -> list[int]:
        """The MSRs to save; asked of the kernel once."""
        if self._msr_indices is None:
            self._msr_indices = kvm.msr_indices(self.device)
        return self._msr_indices

    def set_irq(self, gsi: int, level: bool) -> None:
        line = ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": int(level)})
        self.vm.ioctl(lib.KVM_IRQ_LINE, "KVM_IRQ_LINE", line)

    def get_irqchip(self, chip: str) -> dict:
        return kvm_state.get_chip(self.vm, chip)

    def set_irqchip(self, chip: str, state: dict) -> None:
        kvm_state.set_chip(self.vm, chip, state)

    def get_apic(self, vcpu: base.VCpu) -> bytes:
        assert isinstance(vcpu, KvmVCpu)
        lapic = kvm.get_struct(vcpu.fd, "kvm_lapic_state", "KVM_GET_LAPIC", lib.KVM_GET_LAPIC)
        return bytes(ffi.buffer(lapic.regs))

    def set_apic(self, vcpu: base.VCpu, registers: bytes) -> None:
        assert isinstance(vcpu, KvmVCpu)
        lapic = ffi.new("struct kvm_lapic_state *")
        ffi.buffer(lapic.regs)[:] = registers
        vcpu.fd.ioctl(lib.KVM_SET_LAPIC, "KVM_SET_LAPIC", lapic)

    # Interrupts by eventfd; the module is imported where there is a device that has them.

    @property
    def interrupts(self) -> KvmInterrupts:
        if self._interrupts is None:
            from cpr.accel.kvm_interrupts import KvmInterrupts

            self._interrupts = KvmInterrupts(self.vm)
        return self._interrupts

    def check_irqfds(self) -> None:
        for name, capability in IRQFD_CAPABILITIES:
            if kvm.check_extension(self.vm, capability) <= 0:
                raise KernelError(f"{kvm.DEVICE} lacks {name}", errno.ENOTSUP)

    def add_irqfd(self, gsi: int, eventfd: int, resamplefd: int = -1) -> None:
        self.interrupts.add_irqfd(gsi, eventfd, resamplefd)

    def remove_irqfd(self, gsi: int, eventfd: int) -> None:
        self.interrupts.remove_irqfd(gsi, eventfd)

    def add_messages(self, messages: list[tuple[int, int]]) -> list[int]:
        return self.interrupts.add_messages(messages)

    def set_message(self, gsi: int, address: int, data: int) -> None:
        self.interrupts.set_message(gsi, address, data)

    def remove_message(self, gsi: int) -> None:
        self.interrupts.remove_message(gsi)

    def signal_message(self, address: int, data: int) -> None:
        kvm.signal_msi(self.vm, address, data)

    def add_vfio_file(self, fd: int) -> None:
        self.interrupts.add_vfio_file(fd)

    def remove_vfio_file(self, fd: int) -> None:
        self.interrupts.remove_vfio_file(fd)

    def close(self) -> None:
        if self._interrupts is not None:
            self._interrupts.close()
        self.vm.close()
        self.device.close()
