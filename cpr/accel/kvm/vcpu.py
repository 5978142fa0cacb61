"""One KVM vCPU: its run loop, and what is kept of its state until it can be written."""

from __future__ import annotations

import errno

from cpr._native._cpr import ffi, lib
from cpr.accel import base, x86
from cpr.accel.kvm import cpuid, registers
from cpr.accel.kvm.exits import serve
from cpr.accel.kvm.state import read_vcpu, write_vcpu
from cpr.constants import U64_LIMIT
from cpr.errors import KernelError
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.accel.base import Bus
    from cpr.accel.kvm.accelerator import KvmAccelerator
    from cpr.accel.kvm.cpuid import Cpuid
    from cpr.memory import GuestMemory
    from cpr.uapi.fd import Fd

STEAL_TIME_SIZE, STEAL_SIZE = 64, 8
"""Of struct kvm_steal_time, which is aligned so, and of its first member, ns
(Documentation/virt/kvm/x86/msr.rst)."""

# What a vCPU's state may lack.
AT_POWER_ON = {
    x86.VMSTATE_MSRS.name: {"nmsrs": 0, "entries": []},
    x86.VMSTATE_EVENTS.name: {"kvm_vcpu_events": bytes(x86.EVENTS_SIZE)},
}


class KvmInternalError(KernelError):
    """KVM cannot go on with this guest; the VM stops in runstate internal-error."""

    def __init__(self, text: str) -> None:
        super().__init__(text, errno.EIO, "the guest is stopped and can still be examined")


class KvmVCpu(base.VCpu):
    """Owns its descriptor and its kvm_run area.

    `held_tsc` is the TSC's value while the VM is stopped; `is_tsc_loaded` says that it was set and
    not read.  `loaded_deadline` is the TSC deadline that was set while the VM is stopped, or None.
    `tsc_offset` is None where this kernel does not tell it.
    """

    def __init__(self, accel: KvmAccelerator, index: int) -> None:
        self.index = index
        self.held_tsc: int | None = None
        self.is_tsc_loaded = False
        self.loaded_deadline: int | None = None
        self._accel = accel
        self._tsc_khz: int | None = None
        self._given: dict = {}
        self._run_size = accel.run_size
        self._thread = 0
        self._fd = kvm.create_vcpu(accel.vm, index)
        self._run = kvm.map_run(self._fd, self._run_size)
        self.tsc_offset = _tsc_offset(self._fd)
        self._exit = ffi.new("struct cpr_exit *")
        self.cpuid: Cpuid = cpuid.for_vcpu(cpuid.offered_to_guests(accel.supported_cpuid()), index)
        cpuid.write(self._fd, self.cpuid)

    @property
    def fd(self) -> Fd:
        """The vCPU's descriptor; it stays the vCPU's."""
        return self._fd

    @property
    def saves_cpuid(self) -> bool:
        return self._accel.saves_cpu_model

    def msr_indices(self) -> list[int]:
        """The MSRs to save."""
        return self._accel.msr_indices(self)

    def initial_msrs(self) -> dict[int, int]:
        """What the MSRs are at power-on."""
        return self._accel.initial_msrs(self)

    def run(self, bus: Bus) -> str:
        self.apply_state()
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

    def on_new_thread(self, waited_ns: int, memory: GuestMemory) -> None:
        """Adds to the steal time that the guest is told what KVM is about to take from it.

        KVM adds what the thread has waited since the last time, and the new one begins at 0
        (record_steal_time of arch/x86/kvm/x86.c).
        """
        value = kvm.get_msrs(self._fd, [lib.MSR_KVM_STEAL_TIME]).get(lib.MSR_KVM_STEAL_TIME, 0)
        if value & lib.KVM_MSR_ENABLED:
            address = value & -STEAL_TIME_SIZE
            steal = int.from_bytes(memory.read(address, STEAL_SIZE), "little")
            total = (steal + waited_ns) % U64_LIMIT
            memory.write(address, total.to_bytes(STEAL_SIZE, "little"))

    def tsc_khz(self) -> int:
        if self._tsc_khz is None:
            self._tsc_khz = self._fd.ioctl(lib.KVM_GET_TSC_KHZ, "KVM_GET_TSC_KHZ")
        return self._tsc_khz

    def forget_tsc_khz(self) -> None:
        """It has been set."""
        self._tsc_khz = None

    # State: given in parts (the sections of the stream, the devices of a reset), written as one.

    def get_state(self) -> dict:
        self.apply_state()
        whole = read_vcpu(self)
        del whole[registers.LAPIC]  # given by set_apic, and not by set_state
        return whole

    def set_cpuid(self, model: Cpuid) -> None:
        """Before the vCPU has run for the first time."""
        if model != self.cpuid:
            cpuid.write(self._fd, model)
            self.cpuid = model

    def check_state(self, state: dict) -> None:
        wanted = cpuid.from_state(state)
        if wanted is not None and wanted != self.cpuid:
            cpuid.check(wanted, self._accel.supported_cpuid())

    def set_state(self, state: dict) -> None:
        """MSRs and events that it lacks are set to what they are at power-on."""
        self._given |= AT_POWER_ON | state

    def get_apic(self) -> bytes:
        self.apply_state()
        page: bytes = registers.get_lapic(self)[registers.LAPIC]
        return page

    def set_apic(self, page: bytes) -> None:
        self._given[registers.LAPIC] = page

    def apply_state(self) -> None:
        """Writes what was given.  Raises KernelError, ConfigError; it is forgotten then."""
        given, self._given = self._given, {}
        if given and (registers.LAPIC not in given or "env.regs" not in given):
            given = read_vcpu(self) | given
        if given:
            write_vcpu(self, given)

    def close(self) -> None:
        kvm.unmap_run(self._run, self._run_size)
        self._fd.close()


def _tsc_offset(fd: Fd) -> kvm.TscOffset | None:
    try:
        return kvm.TscOffset(fd)
    except KernelError:
        return None
