"""The model-specific registers of a vCPU: which are saved, and how they are set.

Saved are those that KVM_GET_MSR_INDEX_LIST names, and those that KVM keeps and does not name there:
the MTRRs and the machine-check banks; but not COMMANDS.  Numbers are from the Intel SDM, vol. 4,
table 2-2.
"""

from __future__ import annotations

import errno

from cpr._native._cpr import lib
from cpr.accel import x86
from cpr.errors import KernelError
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.accel.kvm.vcpu import KvmVCpu

TSC = 0x10
APIC_BASE = 0x1B
MCG_CAP, MCG_STATUS, MCG_CTL = 0x179, 0x17A, 0x17B
MTRR_PHYSICAL = range(0x200, 0x210)  # eight pairs of base and mask
MTRR_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
MTRR_DEFAULT_TYPE = 0x2FF
MC0_CTL = 0x400
MSRS_IN_BANK = 4  # CTL, STATUS, ADDR, MISC
TSC_DEADLINE = 0x6E0
EFER = 0xC0000080

BANKS = 0xFF  # of MCG_CAP
UNLISTED = (MCG_STATUS, MCG_CTL, *MTRR_PHYSICAL, *MTRR_FIXED, MTRR_DEFAULT_TYPE)
FIELDS = frozenset({TSC, APIC_BASE, EFER})
"""These are fields of the section of their own, and are not written twice."""

COMMANDS = frozenset({lib.MSR_KVM_WALL_CLOCK, lib.MSR_KVM_WALL_CLOCK_NEW})
"""A write has KVM fill in the guest's RAM, which may be another VMM's still; earlier versions save
them."""


def indices(vcpu: KvmVCpu, listed: list[int]) -> list[int]:
    """What to save, with what KVM has listed; the same for every vCPU of a VM."""
    banks = kvm.get_msrs(vcpu.fd, [MCG_CAP]).get(MCG_CAP, 0) & BANKS
    wanted = [*listed, *UNLISTED, *range(MC0_CTL, MC0_CTL + banks * MSRS_IN_BANK)]
    return [index for index in dict.fromkeys(wanted) if index not in FIELDS | COMMANDS]


def get_msrs(vcpu: KvmVCpu) -> dict:
    values = kvm.get_msrs(vcpu.fd, vcpu.msr_indices())
    if vcpu.loaded_deadline is not None:
        values[TSC_DEADLINE] = vcpu.loaded_deadline
    if not vcpu.saves_cpuid:  # the receiver is of this host, and begins with the same
        initial = vcpu.initial_msrs()
        values = {i: value for i, value in values.items() if value != initial.get(i)}
    entries = [{"index": index, "data": value} for index, value in values.items()]
    return {x86.VMSTATE_MSRS.name: {"nmsrs": len(entries), "entries": entries}}


def set_msrs(vcpu: KvmVCpu, state: dict) -> None:
    """All but the TSC deadline, which is kept for when the VM runs.

    Those that the state lacks are set to what they are at power-on.  Raises KernelError naming
    those that KVM refuses, unless they have the wanted value anyway.
    """
    entries = state[x86.VMSTATE_MSRS.name]["entries"]
    saved = {e["index"]: e["data"] for e in entries if e["index"] not in COMMANDS}
    values = vcpu.initial_msrs() | saved
    vcpu.loaded_deadline = values.pop(TSC_DEADLINE, 0)
    refused = [i for i in kvm.set_msrs(vcpu.fd, list(values.items())) if i in saved]
    if not refused:
        return
    actual = kvm.get_msrs(vcpu.fd, refused)
    lost = [f"{index:#x}" for index in refused if actual.get(index, 0) != saved[index]]
    if lost:
        raise refusal(f"KVM_SET_MSRS of MSR {', '.join(lost)} on {vcpu.fd.name}")


def refusal(operation: str) -> KernelError:
    return KernelError(operation, errno.EINVAL, "this host's KVM lacks what the guest has set")


def get_tsc(vcpu: KvmVCpu) -> dict:
    """While the VM is stopped, what the TSC was when the clock was stopped with it."""
    if vcpu.held_tsc is not None:
        return {"env.tsc": vcpu.held_tsc}
    return {"env.tsc": read_tsc(vcpu)}


def set_tsc(vcpu: KvmVCpu, state: dict) -> None:
    """Keeps it for when the VM runs."""
    vcpu.held_tsc = state["env.tsc"]
    vcpu.is_tsc_loaded = True


def read_tsc(vcpu: KvmVCpu) -> int:
    return kvm.get_msrs(vcpu.fd, [TSC])[TSC]


def write_tsc(vcpu: KvmVCpu, value: int) -> None:
    """Only one that was loaded: a TSC that is set back a little would be taken for another's.

    KVM takes a value within a second of what it expects for an attempt to synchronize TSCs.
    """
    kvm.set_msrs(vcpu.fd, [(TSC, value)])


def write_deadline(vcpu: KvmVCpu) -> None:
    """KVM drops it unless the APIC's timer is in TSC-deadline mode by now."""
    if vcpu.loaded_deadline is not None:
        kvm.set_msrs(vcpu.fd, [(TSC_DEADLINE, vcpu.loaded_deadline)])
    vcpu.loaded_deadline = None
