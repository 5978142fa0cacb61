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
from cpr.errors import ConfigError, KernelError
from cpr.uapi import kvm
from cpr.uapi.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.accel.base import Bus
    from cpr.accel.kvm_interrupts import Irqfd, KvmInterrupts
    from cpr.accel.kvm_resume import ResumedVCpu, ResumedVm
    from cpr.accel.overlap import Overlap
    from cpr.accel.vm_image import VmImage
    from cpr.memory import GuestMemory
    from cpr.state.fds import PreservedFds

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
    """One KVM vCPU; owns its descriptor and its kvm_run area.

    `held`: the exit in kvm_run has not been served, because the vCPU came back from a child.
    """

    held = False

    def __init__(
        self, accel: KvmAccelerator, index: int, resumed: ResumedVCpu | None = None
    ) -> None:
        self.index = index
        self.resumed = resumed
        self._accel = accel
        self._run_size = accel.run_size
        self._cpuid: Any = None
        self._thread = 0
        if resumed is not None:
            self._fd = Fd(resumed.fd, f"kvm-vcpu:{index}")
            self._run, self._exit = resumed.run, resumed.exit
            self.control = resumed.control
            self._thread = resumed.thread
            return
        self._fd = kvm.create_vcpu(accel.vm, index)
        self._run = kvm.map_run(self._fd, self._run_size)
        self._exit = ffi.new("struct cpr_exit *")
        self.control = ffi.new("struct cpr_vcpu_control *")
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
                error = self._next_exit()
                if error == -errno.EINTR:
                    lib.cpr_kvm_set_immediate_exit(self._run, 0)
                    return base.KICKED
                if error == -errno.ECANCELED:  # another has it now
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

    def _next_exit(self) -> int:
        """The next exit, in self._exit: 0 or -errno.  Of a resumed vCPU it may be there already."""
        if self.resumed is not None:
            error, self.resumed = self.resumed.error, None
            return error
        if self.held:
            self.held = False
            lib.cpr_kvm_describe_exit(self._run, self._exit)
            return 0
        return int(lib.cpr_kvm_run(self._fd.number, self._run, self._exit, self.control))

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
        if self._accel.has_state:
            return
        refused = kvm_state.set_vcpu(self._fd, state)
        for index in refused:
            print(
                f"warning: KVM refused MSR {index:#x} of vCPU {self.index}; it keeps its value",
                file=sys.stderr,
            )

    @property
    def run_area(self) -> Any:
        """The struct kvm_run; it stays the vCPU's."""
        return self._run

    @property
    def fd(self) -> Fd:
        """The vCPU's descriptor; it stays the vCPU's."""
        return self._fd

    def close(self) -> None:
        kvm.unmap_run(self._run, self._run_size)
        self._fd.close()


class Memslot:
    """A range of guest-physical addresses: its memslots from number `first` on, of at most `most`
    bytes each, with their flags (KVM_MEM_…) and the host address of the first.
    """

    __slots__ = ("address", "first", "flags", "host_address", "most", "size")

    def __init__(
        self, first: int, address: int, size: int, host_address: int, flags: int, most: int
    ) -> None:
        self.first = first
        self.address = address
        self.size = size
        self.host_address = host_address
        self.flags = flags
        self.most = most or size

    def parts(self) -> list[tuple[int, int, int]]:
        """(number, offset, size) of each memslot."""
        offsets = range(0, self.size, self.most)
        return [
            (self.first + i, offset, min(self.most, self.size - offset))
            for i, offset in enumerate(offsets)
        ]


class KvmAccelerator(base.Accelerator):
    """One KVM VM; owns /dev/kvm and the VM descriptor.

    `resumed` is the VM that this process has made already: it is taken over, and `has_state` is
    true until the machine runs: what the stream says of its state is what it was made from.
    `readable_msrs` are those of the MSRs to save that KVM lets be read, `has_tsc_offset` says
    whether it tells and takes a vCPU's TSC offset.
    """

    name = "kvm"
    kernel_irqchip = True
    addresses = (TSS_ADDRESS, IDENTITY_MAP_ADDRESS)
    pit_flags = lib.KVM_PIT_SPEAKER_DUMMY
    dirty_log = True

    def __init__(self, resumed: ResumedVm | None = None) -> None:
        self.resumed = resumed
        self.has_state = resumed is not None
        self.vcpus: list[KvmVCpu] = []
        self._when_taken_over: list[Callable[[], None]] = []
        self._slots: dict[tuple[int, int], Memslot] = {}
        self._interrupts: KvmInterrupts | None = None
        self._msr_indices: list[int] | None = None
        self.readable_msrs: list[int] = []
        self.has_tsc_offset = False
        if resumed is not None:
            self.device = Fd(resumed.struct.device_fd, kvm.DEVICE)
            self.vm = Fd(resumed.struct.vm_fd, "kvm-vm")
            self.run_size = resumed.struct.run_size
            image = resumed.image
            self.readable_msrs, self.has_tsc_offset = resumed.readable_msrs()
            self.running_since = image.stopped_ns if resumed.overlap else image.resumed_ns
            return
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
        used = {number for slot in self._slots.values() for number, _, _ in slot.parts()}
        first = next(number for number in range(len(used) + 1) if number not in used)
        flags = lib.KVM_MEM_READONLY if readonly else 0
        slot = Memslot(first, address, size, host_address, flags, 0)
        if self.resumed is not None and self.has_state:
            self._claim_section(slot)
        else:
            self._set_slot(slot)
        self._slots[address, size] = slot

    def unmap_ram(self, address: int, size: int) -> None:
        slot = self._slots.pop((address, size))
        for number, offset, _ in slot.parts():
            kvm.set_memory_region(self.vm, number, 0, address + offset, 0, 0)

    def _set_slot(self, slot: Memslot) -> None:
        for number, offset, size in slot.parts():
            address, host = slot.address + offset, slot.host_address + offset
            kvm.set_memory_region(self.vm, number, slot.flags, address, size, host)

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
        log = bytearray()
        for number, _, part in self._slots[address, size].parts():
            bitmap = bytearray((part + BITMAP_ALIGNMENT - 1) // BITMAP_ALIGNMENT * 8)
            kvm.get_dirty_log(self.vm, number, bitmap)
            log += bitmap
        return log

    def _claim_section(self, slot: Memslot) -> None:
        """Takes over the memslots of the VM's image, or sets a new one, of a device."""
        assert self.resumed is not None
        start, end, known = slot.address, slot.address + slot.size, self.resumed.sections
        if all(end <= other or other + size <= start for other, size, _ in known):
            self._set_slot(slot)
            return
        if known.get((start, slot.size, slot.flags)) != slot.host_address:
            raise ConfigError(
                f"{slot.size:#x} bytes of RAM at {start:#x} are not where the guest that was "
                "taken over has them: start the new VMM with the options of the old one"
            )
        slot.most = self.resumed.image.slot_size or slot.size

    def create_irqchip(self) -> None:
        if self.has_state:
            return
        self.vm.ioctl(lib.KVM_CREATE_IRQCHIP, "KVM_CREATE_IRQCHIP")
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        self.vm.ioctl(lib.KVM_CREATE_PIT2, "KVM_CREATE_PIT2", config)

    def create_vcpu(self, index: int) -> KvmVCpu:
        resumed = None
        if self.resumed is not None:
            if index >= len(self.resumed.vcpus):
                raise ConfigError(
                    f"the guest that was taken over has {len(self.resumed.vcpus)} CPUs: "
                    "start the new VMM with the options of the old one"
                )
            resumed = self.resumed.vcpus[index]
        self.vcpus.append(KvmVCpu(self, index, resumed))
        if resumed is None and not index:  # later it could only be asked while it stands still
            self.readable_msrs = list(kvm.get_msrs(self.vcpus[0].fd, self.msr_indices()))
            self.has_tsc_offset = kvm.has_tsc_offset(self.vcpus[0].fd)
        return self.vcpus[-1]

    def msr_indices(self) -> list[int]:
        """The MSRs to save; asked of the kernel once."""
        if self._msr_indices is None:
            self._msr_indices = kvm.msr_indices(self.device)
        return self._msr_indices

    def create_image(self, memory: GuestMemory, command: list[str]) -> VmImage:
        from cpr.accel.vm_image import VmImage

        return VmImage(self, memory, command)

    def create_overlap(
        self, memory: GuestMemory, fds: PreservedFds, way_back: Callable[[str], list[str]]
    ) -> Overlap:
        from cpr.accel.overlap import Overlap

        return Overlap(self, memory, fds, way_back)

    def overlap_blocker(self, memory: GuestMemory) -> str | None:
        for section in memory.sections:
            block = section.block
            if not block.preserved:
                return (
                    f"memory region {block.idstr} is not in a file that goes over the exec; "
                    "share=on is required for memory-backend objects, and aux-ram-share=on"
                )
        return None

    def take_over(self, bus: Bus) -> None:
        if self.resumed is not None and self.resumed.overlap:
            from cpr.accel import overlap

            overlap.take_over(self, bus)
        self.has_state = False
        self.running_since = 0
        self.resumed = None
        self.lend(False)

    def lend(self, lent: bool) -> None:
        """Whether a child runs this VM: what it listens to then stays as it is."""
        if self._interrupts is not None:
            self._interrupts.lent = lent

    def when_taken_over(self, callback: Callable[[], None]) -> None:
        if self.resumed is not None and self.resumed.overlap:
            self._when_taken_over.append(callback)
        else:
            callback()

    def do_what_waits(self) -> None:
        """What devices have done to the VM before it had its state, in their order."""
        waiting, self._when_taken_over = self._when_taken_over, []
        for callback in waiting:
            callback()

    def set_irq(self, gsi: int, level: bool) -> None:
        self.when_taken_over(lambda: self._set_irq(gsi, level))

    def _set_irq(self, gsi: int, level: bool) -> None:
        line = ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": int(level)})
        self.vm.ioctl(lib.KVM_IRQ_LINE, "KVM_IRQ_LINE", line)

    def get_irqchip(self, chip: str) -> dict:
        return kvm_state.get_chip(self.vm, chip)

    def set_irqchip(self, chip: str, state: dict) -> None:
        if self.has_state:
            return
        kvm_state.set_chip(self.vm, chip, state)

    def get_apic(self, vcpu: base.VCpu) -> bytes:
        assert isinstance(vcpu, KvmVCpu)
        lapic = kvm.get_struct(vcpu.fd, "kvm_lapic_state", "KVM_GET_LAPIC", lib.KVM_GET_LAPIC)
        return bytes(ffi.buffer(lapic.regs))

    def set_apic(self, vcpu: base.VCpu, registers: bytes) -> None:
        assert isinstance(vcpu, KvmVCpu)
        if self.has_state:
            return
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

    @property
    def irqfds(self) -> list[Irqfd]:
        return [] if self._interrupts is None else list(self._interrupts.irqfds)

    def check_irqfds(self) -> None:
        for name, capability in IRQFD_CAPABILITIES:
            if kvm.check_extension(self.vm, capability) <= 0:
                raise KernelError(f"{kvm.DEVICE} lacks {name}", errno.ENOTSUP)

    def add_irqfd(self, gsi: int, eventfd: int, resamplefd: int = -1) -> None:
        interrupts = self.interrupts
        self.when_taken_over(lambda: interrupts.add_irqfd(gsi, eventfd, resamplefd))

    def remove_irqfd(self, gsi: int, eventfd: int) -> None:
        self.interrupts.remove_irqfd(gsi, eventfd)

    def add_messages(self, messages: list[tuple[int, int]]) -> list[int]:
        return self.interrupts.add_messages(messages)

    def set_message(self, gsi: int, address: int, data: int) -> None:
        self.interrupts.set_message(gsi, address, data)

    def remove_message(self, gsi: int) -> None:
        self.interrupts.remove_message(gsi)

    def signal_message(self, address: int, data: int) -> None:
        self.when_taken_over(lambda: kvm.signal_msi(self.vm, address, data))

    def add_vfio_file(self, fd: int) -> None:
        self.interrupts.add_vfio_file(fd)

    def remove_vfio_file(self, fd: int) -> None:
        self.interrupts.remove_vfio_file(fd)

    def close(self) -> None:
        if self._interrupts is not None:
            self._interrupts.close()
        self.vm.close()
        self.device.close()
