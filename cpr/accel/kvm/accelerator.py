"""The KVM accelerator: a VM with the in-kernel irqchip and PIT, and real vCPUs.

The order in which things are made matters: memslots before the irqchip and the PIT, because a
memslot that is set after them waits for a grace period (7 ms instead of 0.07 ms).
"""

from __future__ import annotations

import errno

from cpr._native._cpr import ffi, lib
from cpr.accel import base
from cpr.accel.kvm import chips, cpuid, msrs, state
from cpr.accel.kvm.clocks import Clocks
from cpr.accel.kvm.interrupts import KvmInterrupts
from cpr.accel.kvm.native import Native
from cpr.accel.kvm.pit import Pit
from cpr.accel.kvm.vcpu import KvmVCpu
from cpr.constants import PAGE_SIZE
from cpr.errors import KernelError
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.kvm.cpuid import Cpuid

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
BITMAP_ALIGNMENT = 64 * PAGE_SIZE  # what a 64-bit word of a dirty log is for


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
        self.clocks: Clocks = Clocks(self)
        self._given_chips: dict[str, dict] = {}
        self._native: Native | None = None
        self._host_tsc_khz: int | None = None
        self._supported_cpuid: Cpuid | None = None
        self._msr_indices: list[int] | None = None
        self._initial_msrs: dict[int, int] | None = None
        self.device = kvm.open_device()
        try:
            self.vm = kvm.create_vm(self.device)
        except KernelError:
            self.device.close()
            raise
        self.interrupts = KvmInterrupts(self.vm)
        self.pit: Pit = Pit(self.vm)
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
        self.interrupts.set_routing()

    def create_vcpu(self, index: int) -> KvmVCpu:
        self.vcpus.append(KvmVCpu(self, index))
        return self.vcpus[-1]

    # What all vCPUs have in common; asked of the kernel once.

    def supported_cpuid(self) -> Cpuid:
        if self._supported_cpuid is None:
            self._supported_cpuid = cpuid.supported(self.device)
        return self._supported_cpuid

    def msr_indices(self, vcpu: KvmVCpu) -> list[int]:
        if self._msr_indices is None:
            self._msr_indices = msrs.indices(vcpu, kvm.msr_indices(self.device))
        return self._msr_indices

    def initial_msrs(self, vcpu: KvmVCpu) -> dict[int, int]:
        """What they were when this was called first, which is before any guest ran."""
        if self._initial_msrs is None:
            self._initial_msrs = kvm.get_msrs(vcpu.fd, self.msr_indices(vcpu))
        return self._initial_msrs

    def cpu_model(self) -> dict[str, Any]:
        return {"cpuid": [list(entry) for entry in self.vcpus[0].cpuid]} if self.vcpus else {}

    def adopt_cpu_model(self, model: dict[str, Any]) -> None:
        self.check_cpu_model(model)
        entries = tuple(tuple(entry) for entry in model.get("cpuid", ()))
        for vcpu in self.vcpus:
            vcpu.set_cpuid(cpuid.for_vcpu(entries, vcpu.index) if entries else vcpu.cpuid)

    def check_cpu_model(self, model: dict[str, Any]) -> None:
        cpuid.check(model.get("cpuid", ()), self.supported_cpuid())

    def set_irq(self, gsi: int, level: bool) -> None:
        line = ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": int(level)})
        self.vm.ioctl(lib.KVM_IRQ_LINE, "KVM_IRQ_LINE", line)

    # State: given in parts, written in the order of `state` by apply_state.

    def get_irqchip(self, chip: str) -> dict:
        self.apply_state()
        if chip == "i8254":
            return self.pit.get_fields()
        return chips.get_chip(self.vm, chip)

    def set_irqchip(self, chip: str, state: dict) -> None:
        if chip == "i8254":
            self.pit.set_fields(state)
        else:
            self._given_chips[chip] = state

    def get_apic(self, vcpu: base.VCpu) -> bytes:
        assert isinstance(vcpu, KvmVCpu)
        return vcpu.get_apic()

    def set_apic(self, vcpu: base.VCpu, registers: bytes) -> None:
        assert isinstance(vcpu, KvmVCpu)
        vcpu.set_apic(registers)

    def get_clock(self) -> int:
        return self.clocks.get()

    def set_clock(self, ns: int) -> None:
        self.clocks.held = ns

    def apply_state(self) -> None:
        for vcpu in self.vcpus:
            vcpu.apply_state()
        given, self._given_chips = self._given_chips, {}
        state.write_chips(self.vm, given)
        if self._native is not None:
            for each in self._native.parts:
                each.apply()

    @property
    def native(self) -> Native:
        """What reads and writes the whole state at once; made when it is first asked for."""
        if self._native is None:
            self._native = Native(self)
        return self._native

    def native_layout(self) -> Any:
        return self.native.layout()

    def native_size(self, part: int) -> int:
        return self.native.parts[part].size

    def get_native(self, part: int) -> bytes:
        self.apply_state()
        return self.native.parts[part].get()

    def set_native(self, part: int, data: bytes) -> None:
        self.native.parts[part].give(data)

    def stop_time(self, now_ns: int) -> None:
        state.hold_time(self, now_ns)

    def start_time(self, now_ns: int, advance_ns: int = 0) -> None:
        self.apply_state()
        state.release_time(self, now_ns, advance_ns)

    def host_tsc_khz(self) -> int:
        """The frequency of a TSC that KVM does not scale; 0 where it does not tell."""
        if self._host_tsc_khz is None:
            try:
                self._host_tsc_khz = self.vm.ioctl(lib.KVM_GET_TSC_KHZ, "KVM_GET_TSC_KHZ")
            except KernelError:
                self._host_tsc_khz = 0
        return self._host_tsc_khz

    # Interrupts by eventfd.

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

    @property
    def has_irqfds(self) -> bool:  # type: ignore[override]
        return all(kvm.check_extension(self.vm, number) > 0 for _, number in IRQFD_CAPABILITIES)

    @property
    def ioeventfds(self) -> bool:  # type: ignore[override]
        return kvm.check_extension(self.vm, lib.KVM_CAP_IOEVENTFD) > 0

    def add_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
        kvm.assign_ioeventfd(self.vm, address, size, eventfd)

    def remove_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
        kvm.deassign_ioeventfd(self.vm, address, size, eventfd)

    def add_vfio_file(self, fd: int) -> None:
        self.interrupts.add_vfio_file(fd)

    def remove_vfio_file(self, fd: int) -> None:
        self.interrupts.remove_vfio_file(fd)

    def close(self) -> None:
        self.interrupts.close()
        self.vm.close()
        self.device.close()
