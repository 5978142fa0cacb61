"""CPUID: what a guest is told of its processor, and whether this host's KVM can be that.

A CPUID is a tuple of entries (function, index, flags, eax, ebx, ecx, edx), as in struct
kvm_cpuid_entry2.  It is saved with each vCPU; a vCPU keeps it for as long as its guest lives, on
whatever host.
"""

from __future__ import annotations

from cpr._native._cpr import ffi, lib
from cpr.accel import x86
from cpr.errors import ConfigError
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cpr.accel.kvm.vcpu import KvmVCpu
    from cpr.uapi.fd import Fd

    Entry = tuple[int, ...]
    Cpuid = tuple[Entry, ...]

FIELDS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
FIRST_REGISTER = FIELDS.index("eax")
APIC_ID_LEAF = FEATURES_LEAF = 1
TOPOLOGY_LEAVES = (0xB, 0x1F)
ECX = FIELDS.index("ecx")
HYPERVISOR, TSC_DEADLINE = 1 << 31, 1 << 24
"""Of leaf 1, ecx: what KVM can, and does not tell of in KVM_GET_SUPPORTED_CPUID.  Without the first
a Linux guest does not ask for KVM's clock."""

OSXSAVE, OSPKE = 1 << 27, 1 << 4  # copies of CR4's, in leaf 1 and leaf 7

UNSAVED = {
    (0x1, 0): (ECX, 1 << 5),  # VMX: KVM_GET_NESTED_STATE
    (0x80000001, 0): (ECX, 1 << 2),  # SVM: the same
    (0x7, 0): (ECX, 1 << 7),  # SHSTK: the shadow stack's pointer is in no struct and no MSR
}
"""By function and index the register and its bits of features with state of their own that is not
saved: no new guest is offered them.  One that has them from an older version keeps them."""

# (function, index, register, mask): the words whose bits are features, each of which the host has
# or has not (Intel SDM vol. 2, CPUID; AMD64 manual vol. 3, appendix E; for 0x40000001
# Documentation/virt/kvm/x86/cpuid.rst).
ALL = 0xFFFFFFFF
FEATURE_WORDS = (
    (0x1, 0, "ecx", ALL & ~OSXSAVE),
    (0x1, 0, "edx", ALL),
    (0x6, 0, "eax", ALL),
    (0x7, 0, "ebx", ALL),
    (0x7, 0, "ecx", ALL & ~OSPKE),
    (0x7, 0, "edx", ALL),
    (0x7, 1, "eax", ALL),
    (0x7, 1, "ebx", ALL),
    (0x7, 1, "ecx", ALL),
    (0x7, 1, "edx", ALL),
    (0x7, 2, "edx", ALL),
    (0xD, 0, "eax", ALL),
    (0xD, 0, "edx", ALL),
    (0xD, 1, "eax", ALL),
    (0xD, 1, "ecx", ALL),
    (0xD, 1, "edx", ALL),
    (0x14, 0, "ebx", ALL),
    (0x14, 0, "ecx", ALL),
    (0x40000001, 0, "eax", ALL),
    (0x80000001, 0, "ecx", ALL),
    (0x80000001, 0, "edx", ALL),
    (0x80000007, 0, "edx", ALL),
    (0x80000008, 0, "ebx", ALL),
    (0x8000000A, 0, "edx", ALL),
    (0x80000021, 0, "eax", ALL),
    (0xC0000001, 0, "edx", ALL),
)


def supported(device: Fd) -> Cpuid:
    """All that this host can give a guest whose local APICs are KVM's."""
    cpuid = kvm.supported_cpuid(device)
    natives = (cpuid.entries[i] for i in range(cpuid.nent))
    entries = [tuple(getattr(entry, name) for name in FIELDS) for entry in natives]
    untold = HYPERVISOR
    if kvm.check_extension(device, lib.KVM_CAP_TSC_DEADLINE_TIMER) > 0:
        untold |= TSC_DEADLINE
    return tuple(
        (*entry[:ECX], entry[ECX] | untold, *entry[ECX + 1 :])
        if entry[0] == FEATURES_LEAF
        else entry
        for entry in entries
    )


def offered_to_guests(cpuid: Cpuid) -> Cpuid:
    """What of `supported` a new guest has."""
    return tuple(_without_unsaved(entry) for entry in cpuid)


def _without_unsaved(entry: Entry) -> Entry:
    register, bits = UNSAVED.get((entry[0], entry[1]), (ECX, 0))
    return (*entry[:register], entry[register] & ~bits, *entry[register + 1 :])


def for_vcpu(model: Cpuid, index: int) -> Cpuid:
    """The model as vCPU `index` sees it, with its own APIC ID."""
    return tuple(_with_apic_id(entry, index) for entry in model)


def _with_apic_id(entry: Entry, index: int) -> Entry:
    function, subleaf, flags, eax, ebx, ecx, edx = entry
    if function == APIC_ID_LEAF:
        ebx = ebx & 0x00FFFFFF | index << 24
    elif function in TOPOLOGY_LEAVES:
        edx = index
    return (function, subleaf, flags, eax, ebx, ecx, edx)


def write(fd: Fd, model: Cpuid) -> None:
    """KVM_SET_CPUID2."""
    cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": len(model), "entries": len(model)})
    for native, entry in zip(cpuid.entries, model, strict=True):
        for name, value in zip(FIELDS, entry, strict=True):
            setattr(native, name, value)
    fd.ioctl(lib.KVM_SET_CPUID2, "KVM_SET_CPUID2", cpuid)


def get_cpuid(vcpu: KvmVCpu) -> dict:
    """What was set; KVM itself would give it with bits of CR4 and XCR0 mixed in."""
    if not vcpu.saves_cpuid:
        return {}
    entries = [dict(zip(FIELDS, entry, strict=True)) for entry in vcpu.cpuid]
    return {x86.VMSTATE_CPUID.name: {"nent": len(entries), "entries": entries}}


def set_cpuid(vcpu: KvmVCpu, state: dict) -> None:
    """A state from a version that did not save it leaves the vCPU the host's."""
    model = from_state(state)
    if model is not None:
        vcpu.set_cpuid(model)


def from_state(state: dict) -> Cpuid | None:
    """The CPUID in a vCPU's state, or None."""
    saved = state.get(x86.VMSTATE_CPUID.name)
    if saved is None:
        return None
    return tuple(tuple(entry[name] for name in FIELDS) for entry in saved["entries"])


def check(wanted: Iterable[Sequence[int]], offered: Cpuid) -> None:
    """Raises ConfigError naming what `wanted` has and `offered` lacks."""
    missing = cpuid_missing(wanted, offered)
    if missing:
        raise ConfigError(
            "this host's KVM cannot be the guest's processor; it lacks " + ", ".join(missing)
        )


def cpuid_missing(wanted: Iterable[Sequence[int]], offered: Iterable[Sequence[int]]) -> list[str]:
    """The features that `wanted` has and `offered` lacks: "leaf 0x1 ecx bit 24 (tsc-deadline)"."""
    here, there = _by_leaf(wanted), _by_leaf(offered)
    missing = []
    for function, index, register, mask in FEATURE_WORDS:
        place = FIELDS.index(register) - FIRST_REGISTER
        lacking = _word(here, function, index, place) & mask
        lacking &= ~_word(there, function, index, place)
        if lacking:
            missing += _describe(function, index, register, lacking)
    return missing


def _by_leaf(cpuid: Iterable[Sequence[int]]) -> dict[tuple[int, int], Sequence[int]]:
    return {(entry[0], entry[1]): entry[FIRST_REGISTER:] for entry in cpuid}


def _word(leaves: dict, function: int, index: int, place: int) -> int:
    entry = leaves.get((function, index))
    return int(entry[place]) if entry else 0


def _describe(function: int, index: int, register: str, bits: int) -> list[str]:
    from cpr.accel.kvm.cpuid_names import NAMES

    leaf = f"leaf {function:#x}" + (f".{index}" if index else "")
    names = NAMES.get((function, index, register), "").split()
    texts = []
    for bit in range(32):
        if bits >> bit & 1:
            name = names[bit] if bit < len(names) and names[bit] != "-" else ""
            texts.append(f"{leaf} {register} bit {bit}" + (f" ({name})" if name else ""))
    return texts
