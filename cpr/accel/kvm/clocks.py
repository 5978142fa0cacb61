"""What goes on by itself in a KVM VM: its paravirtual clock and the TSCs of its vCPUs.

A guest takes the one for the other's base, so that they are stopped and let go at one instant,
which is a value of the host's TSC: KVM tells it with its clock, and each vCPU's TSC is that and an
offset (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET).  Where KVM does not tell
(before Linux 5.16, on a host whose own clock is another, or where the guest's TSC has another
frequency), the TSC is read and written right after the clock, as an MSR.
"""

from __future__ import annotations

from cpr._native._cpr import lib
from cpr.accel.kvm import msrs
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.accel.kvm.accelerator import KvmAccelerator
    from cpr.accel.kvm.vcpu import KvmVCpu

CLOCK = kvm.StateStruct("kvm_clock_data", "CLOCK")
KHZ_NS = 1_000_000
"""A clock of 1 kHz ticks once in so many ns."""

U64 = (1 << 64) - 1


class Clocks:
    """The clocks of one VM.

    `held` is what the paravirtual clock shows while the VM is stopped, in ns; None while it goes.
    """

    def __init__(self, accel: KvmAccelerator) -> None:
        self._accel = accel
        self._clock = CLOCK.new()
        self.held: int | None = None
        self._instant: int | None = None  # of the host's TSC, or None where that is unknown
        self._elapsed_ns = 0  # since the clock was let go

    def get(self) -> int:
        """ns that the clock shows; while the VM is stopped, when it was stopped."""
        return self._read() if self.held is None else self.held

    def _read(self) -> int:
        clock = self._clock
        CLOCK.read(self._accel.vm, clock)
        self._instant = int(clock.host_tsc) if clock.flags & lib.KVM_CLOCK_HOST_TSC else None
        return int(clock.clock)

    def hold_clock(self) -> None:
        self._instant = None
        self.held = self.get()

    def hold_tscs(self) -> None:
        for vcpu in self._accel.vcpus:
            if not vcpu.is_tsc_loaded:
                vcpu.held_tsc = self._tsc_of(vcpu)

    def _tsc_of(self, vcpu: KvmVCpu) -> int:
        offset = self._offset(vcpu) if self._instant is not None else None
        if self._instant is None or offset is None:
            return msrs.read_tsc(vcpu)
        return self._instant + offset.get() & U64

    def release_clock(self, advance_ns: int) -> None:
        """Lets the clock go, `advance_ns` ahead of where it was held.

        A VM that has never run and was not loaded keeps the clock that KVM began with it.
        """
        started = self.held
        if self.held is not None:
            clock = CLOCK.new()
            clock.clock = self.held + advance_ns
            CLOCK.set(self._accel.vm, clock)
            self.held = None
        now = self._read()
        self._elapsed_ns = now - started if started is not None else 0

    def release_tscs(self, advance_ns: int) -> None:
        for vcpu in self._accel.vcpus:
            held, vcpu.held_tsc = vcpu.held_tsc, None
            was_loaded, vcpu.is_tsc_loaded = vcpu.is_tsc_loaded, False
            if held is None:
                continue
            khz = vcpu.tsc_khz()
            if self._instant is not None and (offset := self._offset(vcpu)) is not None:
                tsc = held + self._elapsed_ns * khz // KHZ_NS
                offset.set(tsc - self._instant & U64)
            elif was_loaded:
                msrs.write_tsc(vcpu, held + advance_ns * khz // KHZ_NS)

    def _offset(self, vcpu: KvmVCpu) -> kvm.TscOffset | None:
        """What the vCPU's TSC is ahead of the host's, or None where that does not tell all."""
        return vcpu.tsc_offset if vcpu.tsc_khz() == self._accel.host_tsc_khz() else None
