"""A VM's state as KVM itself has it: the kernel's structs, for another VM on this very kernel.

    vCPU   struct cpr_kvm_vcpu, then a struct kvm_msr_entry for each MSR that can be read
    VM     struct cpr_kvm_vm

It is what `state` says of each step, in its order, without the way through fields by name, and with
one call for all the steps: the guest of a hand-over stands still meanwhile.  All that is needed is
made beforehand.
"""

from __future__ import annotations

from cpr._native._cpr import ffi, lib
from cpr.accel.kvm import msrs, registers
from cpr.accel.kvm.chips import CHIP_IDS, IRQCHIP
from cpr.accel.kvm.state import CHIP_STEPS, VCPU_STEPS
from cpr.errors import ConfigError, KernelError
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.kvm.accelerator import KvmAccelerator
    from cpr.accel.kvm.vcpu import KvmVCpu

VCPU_SIZE = ffi.sizeof("struct cpr_kvm_vcpu")
VM_SIZE = ffi.sizeof("struct cpr_kvm_vm")


class Part:
    """What reads and writes a part of a VM that is stopped."""

    def __init__(self) -> None:
        self._given: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of `get`."""
        raise NotImplementedError

    def get(self) -> bytes:
        """Raises KernelError."""
        raise NotImplementedError

    def give(self, data: bytes) -> None:
        """Takes over `data` of `get`; in force with `apply`."""
        self._given = data

    def apply(self) -> None:
        """Writes what was given; nothing happens where nothing was.

        Raises KernelError, and ConfigError for what is of another layout.
        """
        data, self._given = self._given, None
        if data is not None:
            self._write(data)

    def _write(self, data: bytes) -> None:
        raise NotImplementedError


class NativeVCpu(Part):
    """One vCPU, which has not run, or is not running."""

    def __init__(self, vcpu: KvmVCpu) -> None:
        super().__init__()
        self._vcpu = vcpu
        self._state = ffi.new("struct cpr_kvm_vcpu *")
        initial = vcpu.initial_msrs()
        self.indices = [index for index in initial if index != msrs.TSC_DEADLINE]
        self._deadline = len(self.indices) if msrs.TSC_DEADLINE in initial else None
        if self._deadline is not None:  # the last one, which is not written with the others
            self.indices.append(msrs.TSC_DEADLINE)
        entries = [(index, initial[index]) for index in self.indices]
        self._msrs, self._initial = kvm.msr_array(entries), kvm.msr_array(entries)
        self._changed = kvm.msr_array(entries)
        self._entries = ffi.buffer(self._msrs.entries)
        self._gets = kvm.Calls(vcpu.fd, True, self._parts(self._msrs)[::-1])
        self._sets = kvm.Calls(vcpu.fd, False, self._parts(self._changed))

    def _parts(self, msr_list: Any) -> list[tuple[kvm.StateStruct, Any]]:
        """The structs of the steps, in their order, and where they are."""
        return [
            (step.struct, msr_list)
            if step.struct is kvm.MSRS
            else (step.struct, ffi.addressof(self._state, step.name))
            for step in VCPU_STEPS
            if step.struct is not None
        ]

    @property
    def size(self) -> int:
        return VCPU_SIZE + len(self._entries)

    def get(self) -> bytes:
        vcpu, state = self._vcpu, self._state
        self._msrs.nmsrs = len(self.indices)
        self._gets.run()
        done = self._gets.result(kvm.MSRS)
        if done != len(self.indices):
            raise self._refusal("KVM_GET_MSRS", self.indices[done])
        if vcpu.loaded_deadline is not None and self._deadline is not None:
            self._msrs.entries[self._deadline].data = vcpu.loaded_deadline
        state.tsc = vcpu.held_tsc if vcpu.held_tsc is not None else msrs.read_tsc(vcpu)
        state.tsc_khz = vcpu.tsc_khz()
        return bytes(ffi.buffer(state)) + bytes(self._entries)

    def _write(self, data: bytes) -> None:
        vcpu, state = self._vcpu, self._state
        ffi.buffer(state)[:] = data[:VCPU_SIZE]
        self._entries[:] = data[VCPU_SIZE:]
        vcpu.held_tsc, vcpu.is_tsc_loaded = state.tsc, True
        if state.tsc_khz != vcpu.tsc_khz():
            registers.set_tsc_khz(vcpu, {"env.tsc_khz": state.tsc_khz})
        last = len(self.indices)
        vcpu.loaded_deadline = None
        if self._deadline is not None:
            vcpu.loaded_deadline = self._msrs.entries[self._deadline].data or None
            last = self._deadline
        registers.make_settable(state.events)
        if lib.cpr_changed_msrs(self._msrs, self._initial, last, self._changed) < 0:
            raise ConfigError("the MSRs of the native state are not those of its layout")
        self._sets.run()
        done = self._sets.result(kvm.MSRS)
        if done != self._changed.nmsrs:
            raise self._refusal("KVM_SET_MSRS", self._changed.entries[done].index)

    def _refusal(self, operation: str, index: int) -> KernelError:
        return msrs.refusal(f"{operation} of MSR {index:#x} on {self._vcpu.fd.name}")


class NativeVm(Part):
    """The clock and the chips; they are written after the vCPUs."""

    size = VM_SIZE

    def __init__(self, accel: KvmAccelerator) -> None:
        super().__init__()
        self._accel = accel
        self._state = ffi.new("struct cpr_kvm_vm *")
        chips = self._state.chips
        parts = [(IRQCHIP, ffi.addressof(chips, number)) for number in range(len(CHIP_STEPS))]
        for native, (chip, _) in zip(chips, CHIP_STEPS, strict=True):
            native.chip_id = CHIP_IDS[chip]
        self._gets = kvm.Calls(accel.vm, True, parts)
        self._sets = kvm.Calls(accel.vm, False, parts)

    def get(self) -> bytes:
        state, accel = self._state, self._accel
        self._gets.run()
        state.clock = accel.clocks.get()
        state.pit = accel.pit.get()[0]
        return bytes(ffi.buffer(state))

    def _write(self, data: bytes) -> None:
        state, accel = self._state, self._accel
        ffi.buffer(state)[:] = data
        self._sets.run()
        accel.clocks.held = state.clock
        accel.pit.set(state.pit)


class Native:
    """All of a VM, made when all its vCPUs are there: the vCPUs in their order, then the rest."""

    def __init__(self, accel: KvmAccelerator) -> None:
        self._vcpus = [NativeVCpu(vcpu) for vcpu in accel.vcpus]
        self.parts: list[Part] = [*self._vcpus, NativeVm(accel)]

    def layout(self) -> Any:
        """What two VMs must have in common, as plain data."""
        steps = [step.name for step in VCPU_STEPS if step.struct is not None]
        chips = [name for name, _ in CHIP_STEPS]
        return [VCPU_SIZE, steps, VM_SIZE, chips, [vcpu.indices for vcpu in self._vcpus]]
