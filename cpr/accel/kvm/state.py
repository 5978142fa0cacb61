"""The state of a VM: the order in which its parts are written and read, with the reasons.

A vCPU is written from the first row of VCPU_STEPS to the last, and read from the last to the
first: what is written last is what writing anything else would disturb, and what reading anything
else would miss.  The chips that all vCPUs share come after the vCPUs.  What goes on by itself
(TIME_STEPS) stands still while the VM is stopped, and is let go in one go when the VM runs.
"""

from __future__ import annotations

from cpr.accel.kvm import chips, cpuid, msrs, registers
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.accel.kvm.accelerator import KvmAccelerator
    from cpr.accel.kvm.vcpu import KvmVCpu
    from cpr.uapi.fd import Fd


class VCpuStep:
    """A part of a vCPU: its name, how it is read and written, and why it comes where it is.

    `struct` is the kernel's of which it is made, if it is one; see `native`.
    """

    __slots__ = ("get", "name", "set", "struct", "why")

    def __init__(
        self,
        name: str,
        get: Callable[[KvmVCpu], dict],
        set_: Callable[[KvmVCpu, dict], None],
        struct: kvm.StateStruct | None,
        why: str,
    ) -> None:
        self.name = name
        self.get = get
        self.set = set_
        self.struct = struct
        self.why = why


class TimeStep:
    """What goes on by itself: how it is stopped, how it is let go, and why in this order.

    hold(accel, now_ns) and release(accel, now_ns, advance_ns), as of hold_time and release_time.
    """

    __slots__ = ("hold", "name", "release", "why")

    def __init__(
        self,
        name: str,
        hold: Callable[[KvmAccelerator, int], None],
        release: Callable[[KvmAccelerator, int, int], None],
        why: str,
    ) -> None:
        self.name = name
        self.hold = hold
        self.release = release
        self.why = why


VCPU_STEPS = (
    VCpuStep(
        "cpuid",
        cpuid.get_cpuid,
        cpuid.set_cpuid,
        None,
        "KVM checks all the rest against it (CR4, XCR0, MSRs, the modes of the APIC's timer), and "
        "takes no other once the vCPU has run.",
    ),
    VCpuStep(
        "tsc_khz",
        registers.get_tsc_khz,
        registers.set_tsc_khz,
        None,
        "The TSC and its deadline are counted in it.",
    ),
    VCpuStep(
        "regs",
        registers.get_regs,
        registers.set_regs,
        registers.REGS,
        "Before the events: KVM_SET_REGS drops a pending exception.  Before sregs, where KVM finds "
        "out by RIP whether vCPU 0 is at the reset vector.",
    ),
    VCpuStep(
        "sregs",
        registers.get_sregs,
        registers.set_sregs,
        registers.SREGS,
        "Before the local APIC: apic_base is in it, which says whether the APIC is on and whether "
        "it is in x2APIC mode, in which its ID has another format.  Before mp_state: at the reset "
        "vector KVM makes vCPU 0 runnable.",
    ),
    VCpuStep(
        "xcr0",
        registers.get_xcr0,
        registers.set_xcr0,
        registers.XCRS,
        "After CPUID, which says what may be in it; before the XSAVE area that it describes.",
    ),
    VCpuStep("xsave", registers.get_xsave, registers.set_xsave, registers.XSAVE, "After XCR0."),
    VCpuStep(
        "debug",
        registers.get_debug,
        registers.set_debug,
        registers.DEBUG,
        "Read after the events: KVM puts the payload of a pending #DB into DR6 when it is asked "
        "for those.",
    ),
    VCpuStep(
        "lapic",
        registers.get_lapic,
        registers.set_lapic,
        registers.LAPIC_REGISTERS,
        "Before the MSRs: KVM drops a TSC deadline unless the timer is in TSC-deadline mode, and "
        "paravirtual MSRs send interrupts to the APIC.  Read after mp_state, which an INIT goes "
        "through.",
    ),
    VCpuStep(
        "tsc",
        msrs.get_tsc,
        msrs.set_tsc,
        None,
        "Only kept here; it is written when the VM runs, see TIME_STEPS.",
    ),
    VCpuStep(
        "msrs",
        msrs.get_msrs,
        msrs.set_msrs,
        kvm.MSRS,
        "After CPUID, which says which there are, and after the APIC.  The TSC deadline among them "
        "is kept until the TSC is written.",
    ),
    VCpuStep(
        "events",
        registers.get_events,
        registers.set_events,
        registers.EVENTS,
        "After regs and sregs, which drop or change what is in flight.  Read before debug and "
        "sregs, because reading events moves the payload of an exception into DR6 or CR2.",
    ),
    VCpuStep(
        "mp_state",
        registers.get_mp_state,
        registers.set_mp_state,
        registers.MP_STATE,
        "Last, because sregs may change it.  Read first: KVM takes in a pending INIT or SIPI then, "
        "which changes everything else.",
    ),
)

CHIP_STEPS = (
    ("i8259-0", "Before the I/O APIC; the timer, whose interrupts go to it, is among TIME_STEPS."),
    ("i8259-1", "As its master."),
    (
        "ioapic",
        "After the local APICs: writing it sends them what is pending in it, and a local APIC that "
        "is not on yet drops that.",
    ),
)

TIME_STEPS = (
    TimeStep(
        "clock",
        lambda accel, now_ns: accel.clocks.hold_clock(),
        lambda accel, now_ns, advance_ns: accel.clocks.release_clock(advance_ns),
        "Before the TSCs, because KVM tells with it the instant for which theirs are reckoned, and "
        "where it does not, just before them: a guest takes the one for the other's base.",
    ),
    TimeStep(
        "tsc",
        lambda accel, now_ns: accel.clocks.hold_tscs(),
        lambda accel, now_ns, advance_ns: accel.clocks.release_tscs(advance_ns),
        "One right after the other: KVM gives TSCs that are written within a second one offset.",
    ),
    TimeStep(
        "deadline",
        lambda accel, now_ns: None,  # it is an MSR that does not move
        lambda accel, now_ns, advance_ns: _each(accel.vcpus, msrs.write_deadline),
        "After the TSC against which it counts, and after the APIC's mode.",
    ),
    TimeStep(
        "stopped",
        lambda accel, now_ns: None,
        lambda accel, now_ns, advance_ns: _each(
            accel.vcpus, lambda vcpu: kvm.tell_stopped(vcpu.fd)
        ),
        "With the clock and the TSCs as they are to be: the guest takes the time in between for no "
        "lockup of its own (Documentation/virt/kvm/api.rst).",
    ),
    TimeStep(
        "i8254",
        lambda accel, now_ns: accel.pit.hold(now_ns),
        lambda accel, now_ns, advance_ns: accel.pit.release(now_ns - advance_ns),
        "Last: it counts, and raises IRQ 0 at the interrupt controllers, from now on.",
    ),
)


def read_vcpu(vcpu: KvmVCpu) -> dict:
    """The whole state of a vCPU that is not running."""
    state: dict = {}
    for step in reversed(VCPU_STEPS):
        state |= step.get(vcpu)
    return state


def write_vcpu(vcpu: KvmVCpu, state: dict) -> None:
    """Writes a whole state into a vCPU that is not running.  Raises KernelError, ConfigError."""
    for step in VCPU_STEPS:
        step.set(vcpu, state)


def write_chips(vm: Fd, states: dict[str, dict]) -> None:
    """Writes the chips that `states` has, after the vCPUs."""
    for chip, _ in CHIP_STEPS:
        if chip in states:
            chips.set_chip(vm, chip, states[chip])


def hold_time(accel: KvmAccelerator, now_ns: int) -> None:
    """The VM has stopped at `now_ns` of CLOCK_MONOTONIC: reads what goes on by itself."""
    for step in TIME_STEPS:
        step.hold(accel, now_ns)


def release_time(accel: KvmAccelerator, now_ns: int, advance_ns: int) -> None:
    """The VM is about to run: lets everything go on from where it was stopped or loaded.

    It is to have gone on for `advance_ns` meanwhile.
    """
    for step in TIME_STEPS:
        step.release(accel, now_ns, advance_ns)


def _each(vcpus: list[KvmVCpu], function: Callable[[KvmVCpu], None]) -> None:
    for vcpu in vcpus:
        function(vcpu)
