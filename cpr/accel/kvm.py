"""The KVM accelerator: a VM with the in-kernel irqchip and PIT, and real vCPUs.

The order in which things are made matters: memslots before the irqchip and the PIT, because a
memslot that is set after them waits for a grace period (7 ms instead of 0.07 ms).
"""

from __future__ import annotations

import errno
import sys

from cpr._native._cpr import ffi, lib
from cpr.accel import base, kvm_state
from cpr.errors import KernelError
from cpr.uapi import kvm
from cpr.uapi.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.accel.base import Bus

# Three pages for KVM's own TSS and one for its identity map, below the BIOS, as on every PC VMM.
IDENTITY_MAP_ADDRESS = 0xFEFFC000
TSS_ADDRESS = 0xFEFFD000

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
        self._fd = kvm.create_vcpu(accel.vm, index)
        self._run_size = accel.run_size
        self._run = kvm.map_run(self._fd, self._run_size)
        self._exit = ffi.new("struct cpr_exit *")
        self._thread = 0
        self._set_cpuid()

    def _set_cpuid(self) -> None:
        cpuid = kvm.supported_cpuid(self._accel.device)
        for i in range(cpuid.nent):
            entry = cpuid.entries[i]
            if entry.function == CPUID_APIC_ID_LEAF:
                entry.ebx = (entry.ebx & 0x00FFFFFF) | self.index << 24
            elif entry.function in CPUID_TOPOLOGY_LEAVES:
                entry.edx = self.index
        self._fd.ioctl(lib.KVM_SET_CPUID2, "KVM_SET_CPUID2", cpuid)

    def run(self, bus: Bus) -> str:
        exit_ = self._exit
        self._thread = lib.cpr_vcpu_thread_enter()
        try:
            while True:
                error = lib.cpr_kvm_run(self._fd.number, self._run, exit_)
                if error == -errno.EINTR:
                    lib.cpr_kvm_set_immediate_exit(self._run, 0)
                    return base.KICKED
                if error:
                    raise KernelError(f"KVM_RUN on vCPU {self.index}", -error)
                reason = exit_.reason
                if reason == lib.KVM_EXIT_IO:
                    self._serve_io(bus)
                elif reason == lib.KVM_EXIT_MMIO:
                    self._serve_mmio(bus)
                elif reason == lib.KVM_EXIT_SHUTDOWN:
                    return base.SHUTDOWN
                elif reason == lib.KVM_EXIT_HLT:
                    continue
                else:
                    raise self._internal_error(reason)
        finally:
            self._thread = 0

    def _serve_io(self, bus: Bus) -> None:
        exit_ = self._exit
        size = exit_.size
        for i in range(exit_.count):
            data = ffi.buffer(exit_.data + i * size, size)
            if exit_.is_write:
                bus.io_write(exit_.port, size, int.from_bytes(data[:], "little"))
            else:
                data[:] = bus.io_read(exit_.port, size).to_bytes(size, "little")

    def _serve_mmio(self, bus: Bus) -> None:
        exit_ = self._exit
        size = exit_.size
        data = ffi.buffer(exit_.data, size)
        if exit_.is_write:
            bus.mmio_write(exit_.address, size, int.from_bytes(data[:], "little"))
        else:
            data[:] = bus.mmio_read(exit_.address, size).to_bytes(size, "little")

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
    """A memslot as it was set: its number, flags (KVM_MEM_…) and host address."""

    __slots__ = ("flags", "host_address", "number")

    def __init__(self, number: int, flags: int, host_address: int) -> None:
        self.number = number
        self.flags = flags
        self.host_address = host_address


class KvmAccelerator(base.Accelerator):
    """One KVM VM; owns /dev/kvm and the VM descriptor."""

    name = "kvm"
    kernel_irqchip = True
    dirty_log = True

    def __init__(self) -> None:
        self.device = kvm.open_device()
        try:
            self.vm = kvm.create_vm(self.device)
        except KernelError:
            self.device.close()
            raise
        self.run_size = kvm.vcpu_mmap_size(self.device)
        self._slots: dict[tuple[int, int], Memslot] = {}
        self._msr_indices: list[int] | None = None
        self.vm.ioctl(lib.KVM_SET_TSS_ADDR, "KVM_SET_TSS_ADDR", TSS_ADDRESS)
        identity = ffi.new("uint64_t *", IDENTITY_MAP_ADDRESS)
        self.vm.ioctl(lib.KVM_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR", identity)
        lib.cpr_kick_install()

    def map_ram(self, address: int, size: int, host_address: int, readonly: bool = False) -> None:
        used = {slot.number for slot in self._slots.values()}
        number = next(each for each in range(len(used) + 1) if each not in used)
        slot = Memslot(number, lib.KVM_MEM_READONLY if readonly else 0, host_address)
        self._set_slot(address, size, slot)
        self._slots[address, size] = slot

    def unmap_ram(self, address: int, size: int) -> None:
        slot = self._slots.pop((address, size))
        kvm.set_memory_region(self.vm, slot.number, 0, address, 0, 0)

    def _set_slot(self, address: int, size: int, slot: Memslot) -> None:
        kvm.set_memory_region(self.vm, slot.number, slot.flags, address, size, slot.host_address)

    def start_dirty_log(self) -> None:
        try:
            for (address, size), slot in self._slots.items():
                if not slot.flags & lib.KVM_MEM_READONLY:
                    slot.flags |= lib.KVM_MEM_LOG_DIRTY_PAGES
                    self._set_slot(address, size, slot)
        except KernelError:
            self.stop_dirty_log()
            raise

    def stop_dirty_log(self) -> None:
        for (address, size), slot in self._slots.items():
            if slot.flags & lib.KVM_MEM_LOG_DIRTY_PAGES:
                slot.flags &= ~lib.KVM_MEM_LOG_DIRTY_PAGES
                self._set_slot(address, size, slot)

    def take_dirty_log(self, address: int, size: int) -> bytearray:
        bitmap = bytearray((size + BITMAP_ALIGNMENT - 1) // BITMAP_ALIGNMENT * 8)
        kvm.get_dirty_log(self.vm, self._slots[address, size].number, bitmap)
        return bitmap

    def create_irqchip(self) -> None:
        self.vm.ioctl(lib.KVM_CREATE_IRQCHIP, "KVM_CREATE_IRQCHIP")
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        self.vm.ioctl(lib.KVM_CREATE_PIT2, "KVM_CREATE_PIT2", config)

    def create_vcpu(self, index: int) -> KvmVCpu:
        return KvmVCpu(self, index)

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

    def close(self) -> None:
        self.vm.close()
        self.device.close()
