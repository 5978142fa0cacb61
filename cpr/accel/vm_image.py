"""A KVM VM as a memfd for the next image: its layout, and its state as the kernel's own structs.

The next image makes its VM from it before it has read its command line, and lets the guest go on;
or, in an overlap, takes the guest from the child that runs it meanwhile.  The layout is
_native/vm_image.h's.  It goes over the exec as the preserved descriptors ("x-cpr-vm", 0).
"""

from __future__ import annotations

import os
import time

from cpr._native._cpr import ffi, lib
from cpr.accel import kvm_state
from cpr.accel.kvm_resume import CPU_SET_SIZE, restore_affinity, set_text
from cpr.errors import KernelError, MigrationError
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.kvm import KvmAccelerator, KvmVCpu
    from cpr.memory import GuestMemory
    from cpr.state.fds import PreservedFds

NAME = "x-cpr-vm"
IMAGE, REQUEST, STREAM = range(3)  # ids under that name
PAGE_SIZE = 4096
ALIGNMENT = 64
MSR_TSC = kvm_state.MSR_TSC
MSR_TSC_DEADLINE = kvm_state.MSR_TSC_DEADLINE

CHIPS = ("i8259-0", "i8259-1", "ioapic")


class VmImage:
    """The image of one VM.  Owns its memfd and its mapping until `close`."""

    def __init__(self, accel: KvmAccelerator, memory: GuestMemory, command: list[str]) -> None:
        """Lays the VM out; its state comes with `capture`.

        `command` is what goes back to this VMM.  Raises MigrationError where the VM cannot be
        described so: RAM that is not in shared files, or more parts than the image has room for.
        """
        self._accel = accel
        self._steps: list[tuple[int, int, int, int, int]] = []
        self._parts: list[tuple[int, bytes]] = []
        self._end = ffi.sizeof("struct cpr_vm_image")
        self._vcpus: list[KvmVCpu] = accel.vcpus
        restore_affinity()
        words = b"".join(os.fsencode(word) + b"\0" for word in command)
        cpuid = [bytes(ffi.buffer(vcpu.cpuid)) for vcpu in self._vcpus]
        exits = self._room(len(self._vcpus) * ffi.sizeof("struct cpr_vm_exit"))
        cpuid_at = self._place(b"".join(cpuid))
        command_at = self._place(words)
        irqfds = self._room(lib.CPR_VM_IRQFDS * ffi.sizeof("struct kvm_irqfd"))
        affinity_at = self._place(cpu_set(os.sched_getaffinity(0)))
        for vcpu in self._vcpus:
            self._add_vcpu(vcpu)
        self._add_chips()
        steps_at = self._room(len(self._steps) * ffi.sizeof("struct cpr_vm_step"))
        self._map()
        header = self.header
        header.abi = lib.CPR_VM_ABI
        header.tss_address, header.identity_address = accel.addresses
        header.pit_flags = accel.pit_flags
        header.vcpus = len(self._vcpus)
        header.cpuid, header.cpuid_size = cpuid_at, len(cpuid[0])
        header.exits, header.steps, header.step_count = exits, steps_at, len(self._steps)
        header.command, header.command_size = command_at, len(words)
        header.affinity, header.irqfds = affinity_at, irqfds
        for offset, data in self._parts:
            ffi.buffer(ffi.cast("char *", self._address + offset), len(data))[:] = data
        steps = ffi.cast("struct cpr_vm_step *", self._address + steps_at)
        for i, step in enumerate(self._steps):
            steps[i].vcpu, steps[i].kind, steps[i].get, steps[i].set, steps[i].offset = step
        try:
            self._describe_memory(memory)
        except MigrationError:
            self.close()
            raise

    def _room(self, size: int) -> int:
        """The offset of `size` bytes, zero."""
        offset = (self._end + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        self._end = offset + size
        return offset

    def _place(self, data: bytes) -> int:
        offset = self._room(len(data))
        self._parts.append((offset, data))
        return offset

    def _step(self, vcpu: int, kind: int, get: int, set: int, data: bytes | int) -> None:
        offset = self._room(data) if isinstance(data, int) else self._place(data)
        self._steps.append((vcpu, kind, get, set, offset))

    def _add_vcpu(self, vcpu: KvmVCpu) -> None:
        """In the order in which the structs are written; see kvm_state.set_vcpu for why."""
        index, plain = vcpu.index, lib.CPR_STEP_PLAIN
        indices = [i for i in self._accel.readable_msrs if i not in kvm_state.FIELD_MSRS]
        deadline = [i for i in indices if i == MSR_TSC_DEADLINE]
        indices = [i for i in indices if i != MSR_TSC_DEADLINE]

        def add(name: str, get: int, set: int, kind: int = plain) -> None:
            self._step(index, kind, get, set, ffi.sizeof(f"struct {name}"))

        def add_msrs(indices: list[int], kind: int) -> None:
            msrs = bytes(ffi.buffer(kvm.msr_array([(i, 0) for i in indices])))
            self._step(index, kind, lib.KVM_GET_MSRS, lib.KVM_SET_MSRS, msrs)

        add("kvm_mp_state", lib.KVM_GET_MP_STATE, 0)
        add("kvm_regs", lib.KVM_GET_REGS, lib.KVM_SET_REGS)
        add("kvm_xcrs", lib.KVM_GET_XCRS, lib.KVM_SET_XCRS)
        add("kvm_xsave", lib.KVM_GET_XSAVE, lib.KVM_SET_XSAVE)
        add("kvm_sregs2", lib.KVM_GET_SREGS2, lib.KVM_SET_SREGS2)
        add_msrs([MSR_TSC], lib.CPR_STEP_TSC)
        if self._accel.has_tsc_offset:
            get, set = lib.KVM_GET_DEVICE_ATTR, lib.KVM_SET_DEVICE_ATTR
            self._step(index, lib.CPR_STEP_TSC_OFFSET, get, set, ffi.sizeof("uint64_t"))
        add_msrs(indices, lib.CPR_STEP_MSRS)
        add(
            "kvm_vcpu_events",
            lib.KVM_GET_VCPU_EVENTS,
            lib.KVM_SET_VCPU_EVENTS,
            lib.CPR_STEP_EVENTS,
        )
        add("kvm_mp_state", lib.KVM_GET_MP_STATE, lib.KVM_SET_MP_STATE)
        add("kvm_debugregs", lib.KVM_GET_DEBUGREGS, lib.KVM_SET_DEBUGREGS)
        add("kvm_lapic_state", lib.KVM_GET_LAPIC, lib.KVM_SET_LAPIC)
        if deadline:  # it counts only when the local APIC is in its mode
            add_msrs(deadline, lib.CPR_STEP_MSRS)

    def _add_chips(self) -> None:
        plain = lib.CPR_STEP_PLAIN
        for chip in CHIPS:
            struct = ffi.new("struct kvm_irqchip *", {"chip_id": kvm_state.CHIP_IDS[chip]})
            data = bytes(ffi.buffer(struct))
            self._step(-1, plain, lib.KVM_GET_IRQCHIP, lib.KVM_SET_IRQCHIP, data)
        pit, clock = ffi.sizeof("struct kvm_pit_state2"), ffi.sizeof("struct kvm_clock_data")
        self._step(-1, lib.CPR_STEP_PIT, lib.KVM_GET_PIT2, lib.KVM_SET_PIT2, pit)
        self._step(-1, lib.CPR_STEP_CLOCK, lib.KVM_GET_CLOCK, lib.KVM_SET_CLOCK, clock)

    def _map(self) -> None:
        self._size = (self._end + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        self.fd = os.memfd_create(NAME)
        os.ftruncate(self.fd, self._size)
        self._address = kvm.map_image(self.fd, self._size)
        self.header: Any = ffi.cast("struct cpr_vm_image *", self._address)
        self.header.size = self._size
        self.header.request_fd = -1

    def _describe_memory(self, memory: GuestMemory) -> None:
        header = self.header
        blocks = [block for block in memory.blocks if block.fd >= 0]
        if len(blocks) > lib.CPR_VM_BLOCKS or len(memory.sections) > lib.CPR_VM_SECTIONS:
            raise MigrationError("the VM has more memory blocks than its image has room for")
        numbers = {}
        for number, block in enumerate(blocks):
            numbers[block.idstr] = number
            entry = header.blocks[number]
            entry.fd, entry.size, entry.alignment = block.fd, block.max_length, block.alignment
        for number, section in enumerate(memory.sections):
            block = section.block
            if block.idstr not in numbers or not block.preserved:
                raise MigrationError(f"memory region {block.idstr} is not in a preserved file")
            entry = header.sections[number]
            entry.address, entry.size, entry.offset = section.start, section.size, section.offset
            entry.block = numbers[block.idstr]
            entry.flags = lib.KVM_MEM_READONLY if section.readonly else 0
        header.block_count, header.section_count = len(blocks), len(memory.sections)

    def exit(self, vcpu: int) -> Any:
        """The struct cpr_vm_exit of a vCPU."""
        exits = ffi.cast("struct cpr_vm_exit *", self._address + self.header.exits)
        return exits[vcpu]

    def list_irqfds(self) -> bool:
        """Lists the irqfds that the VM has now; false where there is no room for so many."""
        irqfds = self._accel.irqfds
        if len(irqfds) > lib.CPR_VM_IRQFDS:
            return False
        entries = ffi.cast("struct kvm_irqfd *", self._address + self.header.irqfds)
        for entry, irqfd in zip(entries[0 : len(irqfds)], irqfds, strict=True):
            kvm.fill_irqfd(entry, irqfd.gsi, irqfd.eventfd, irqfd.resamplefd)
        self.header.irqfd_count = len(irqfds)
        return True

    def save(self, fds: PreservedFds) -> None:
        """Makes the image go over the exec; `unsave` is the inverse."""
        fds.save(NAME, IMAGE, self.fd)

    def unsave(self, fds: PreservedFds) -> None:
        fds.delete(NAME, IMAGE)

    def capture(self) -> None:
        """Puts the state of a VM whose vCPUs stand still into the image.  Raises KernelError."""
        header = self.header
        vcpu_fds = ffi.new("int32_t[]", [vcpu.fd.number for vcpu in self._vcpus])
        header.mode = lib.CPR_VM_STOPPED
        error = lib.cpr_vm_image_capture(header, self._accel.vm.number, vcpu_fds)
        if error:
            header.mode = lib.CPR_VM_NONE
            raise KernelError(f"step {header.failed_step} of reading the VM's state", -error)
        header.stopped_ns = time.monotonic_ns()

    def set_text(self, field: str, text: str) -> None:
        """Sets a text of the header, cut to what there is room for."""
        set_text(self.header, field, text)

    def close(self) -> None:
        kvm.unmap_image(self._address, self._size)
        os.close(self.fd)


def cpu_set(cpus: set[int]) -> bytes:
    """A cpu_set_t."""
    bits = 0
    for cpu in cpus:
        bits |= 1 << cpu
    return (bits & (1 << 8 * CPU_SET_SIZE) - 1).to_bytes(CPU_SET_SIZE, "little")
