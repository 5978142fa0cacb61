"""KVM's structs to and from the vmstate fields that every accelerator shares."""

from __future__ import annotations

from cpr._native._cpr import ffi, lib
from cpr.accel import x86
from cpr.accel.irqchip import PIC_ELCR_MASKS, PIC_FIELDS
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.uapi.fd import Fd

# env.regs in x86.RAX … order, by the names of struct kvm_regs.
GPR_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi") + tuple(
    f"r{number}" for number in range(8, 16)
)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")

MSR_TSC = 0x10
MSR_APIC_BASE = 0x1B
MSR_TSC_DEADLINE = 0x6E0
MSR_EFER = 0xC0000080
# These are fields of the section or of sregs2, and must not be written twice.
FIELD_MSRS = frozenset({MSR_TSC, MSR_APIC_BASE, MSR_EFER})
XCR0 = 0


def get_segment(segment: Any) -> dict:
    flags = (
        segment.type << x86.FLAG_TYPE_SHIFT
        | segment.s << 12
        | segment.dpl << x86.FLAG_DPL_SHIFT
        | segment.present << 15
        | segment.avl << 20
        | segment.l << 21
        | segment.db << 22
        | segment.g << 23
    )
    return x86.segment(segment.selector, segment.base, segment.limit, flags)


def set_segment(segment: Any, state: dict) -> None:
    flags = state["flags"]
    segment.selector = state["selector"]
    segment.base = state["base"]
    segment.limit = state["limit"]
    segment.type = flags >> x86.FLAG_TYPE_SHIFT & 15
    segment.s = flags >> 12 & 1
    segment.dpl = flags >> x86.FLAG_DPL_SHIFT & 3
    segment.present = flags >> 15 & 1
    segment.avl = flags >> 20 & 1
    segment.l = flags >> 21 & 1
    segment.db = flags >> 22 & 1
    segment.g = flags >> 23 & 1
    segment.unusable = not segment.present


def get_vcpu(fd: Fd, msr_indices: list[int]) -> dict:
    """Reads a whole vCPU that is not running: the fields of x86.VMSTATE_CPU."""
    # mp_state first: reading it makes KVM take in a pending INIT or SIPI.
    mp_state = kvm.get_struct(fd, "kvm_mp_state", "KVM_GET_MP_STATE", lib.KVM_GET_MP_STATE)
    regs = kvm.get_struct(fd, "kvm_regs", "KVM_GET_REGS", lib.KVM_GET_REGS)
    sregs = kvm.get_struct(fd, "kvm_sregs2", "KVM_GET_SREGS2", lib.KVM_GET_SREGS2)
    xsave = kvm.get_struct(fd, "kvm_xsave", "KVM_GET_XSAVE", lib.KVM_GET_XSAVE)
    xcrs = kvm.get_struct(fd, "kvm_xcrs", "KVM_GET_XCRS", lib.KVM_GET_XCRS)
    debug = kvm.get_struct(fd, "kvm_debugregs", "KVM_GET_DEBUGREGS", lib.KVM_GET_DEBUGREGS)
    events = kvm.get_struct(fd, "kvm_vcpu_events", "KVM_GET_VCPU_EVENTS", lib.KVM_GET_VCPU_EVENTS)
    msrs = kvm.get_msrs(fd, msr_indices)
    xcr0 = next((xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs) if xcrs.xcrs[i].xcr == XCR0), 1)
    entries = [{"index": i, "data": v} for i, v in msrs.items() if i not in FIELD_MSRS]
    return {
        "env.regs": [getattr(regs, name) for name in GPR_NAMES],
        "env.eip": regs.rip,
        "env.eflags": regs.rflags,
        "env.segs": [get_segment(getattr(sregs, name)) for name in SEGMENT_NAMES],
        "env.ldt": get_segment(sregs.ldt),
        "env.tr": get_segment(sregs.tr),
        "env.gdt": x86.segment(base=sregs.gdt.base, limit=sregs.gdt.limit),
        "env.idt": x86.segment(base=sregs.idt.base, limit=sregs.idt.limit),
        "env.cr": [sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4],
        "env.cr8": sregs.cr8,
        "env.dr": [*debug.db, 0, 0, debug.dr6, debug.dr7],
        "env.efer": sregs.efer,
        "env.apic_base": sregs.apic_base,
        "env.xcr0": xcr0,
        "env.tsc": msrs.get(MSR_TSC, 0),
        "env.tsc_khz": fd.ioctl(lib.KVM_GET_TSC_KHZ, "KVM_GET_TSC_KHZ"),
        "env.sregs2_flags": sregs.flags,
        "env.pdptrs": list(sregs.pdptrs),
        "env.mp_state": mp_state.mp_state,
        "env.interrupt_shadow": 0,
        "env.a20_mask": 1,
        "env.xsave_buf": bytes(ffi.buffer(xsave)[0 : x86.XSAVE_SIZE]),
        x86.VMSTATE_MSRS.name: {"nmsrs": len(entries), "entries": entries},
        x86.VMSTATE_EVENTS.name: {"kvm_vcpu_events": bytes(ffi.buffer(events)[:])},
    }


def set_vcpu(fd: Fd, state: dict) -> list[int]:
    """Writes a whole vCPU that is not running; returns the MSRs that KVM refused.

    The local APIC is written after this (its timer depends on MSRs written here).
    """
    _set_regs(fd, state)
    _set_fpu(fd, state)
    _set_sregs(fd, state)
    refused = _set_msrs(fd, state)
    events = state.get(x86.VMSTATE_EVENTS.name)
    if events is not None:
        _set_events(fd, events["kvm_vcpu_events"])
    mp_state = ffi.new("struct kvm_mp_state *", {"mp_state": state["env.mp_state"]})
    fd.ioctl(lib.KVM_SET_MP_STATE, "KVM_SET_MP_STATE", mp_state)
    debug = ffi.new("struct kvm_debugregs *")
    for i in range(4):
        debug.db[i] = state["env.dr"][i]
    debug.dr6, debug.dr7 = state["env.dr"][6:8]
    fd.ioctl(lib.KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS", debug)
    return refused


def _set_regs(fd: Fd, state: dict) -> None:
    regs = ffi.new("struct kvm_regs *")
    for name, value in zip(GPR_NAMES, state["env.regs"], strict=True):
        setattr(regs, name, value)
    regs.rip = state["env.eip"]
    regs.rflags = state["env.eflags"]
    fd.ioctl(lib.KVM_SET_REGS, "KVM_SET_REGS", regs)


def _set_fpu(fd: Fd, state: dict) -> None:
    xcrs = ffi.new("struct kvm_xcrs *", {"nr_xcrs": 1})
    xcrs.xcrs[0].xcr = XCR0
    xcrs.xcrs[0].value = state["env.xcr0"]
    fd.ioctl(lib.KVM_SET_XCRS, "KVM_SET_XCRS", xcrs)
    xsave = ffi.new("struct kvm_xsave *")
    ffi.buffer(xsave)[0 : x86.XSAVE_SIZE] = state["env.xsave_buf"]
    fd.ioctl(lib.KVM_SET_XSAVE, "KVM_SET_XSAVE", xsave)


def _set_sregs(fd: Fd, state: dict) -> None:
    sregs = ffi.new("struct kvm_sregs2 *")
    for name, segment in zip(SEGMENT_NAMES, state["env.segs"], strict=True):
        set_segment(getattr(sregs, name), segment)
    set_segment(sregs.ldt, state["env.ldt"])
    set_segment(sregs.tr, state["env.tr"])
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        table.base = state[f"env.{name}"]["base"]
        table.limit = state[f"env.{name}"]["limit"]
    sregs.cr0, _, sregs.cr2, sregs.cr3, sregs.cr4 = state["env.cr"]
    sregs.cr8 = state["env.cr8"]
    sregs.efer = state["env.efer"]
    sregs.apic_base = state["env.apic_base"]
    sregs.flags = state["env.sregs2_flags"]
    for i, value in enumerate(state["env.pdptrs"]):
        sregs.pdptrs[i] = value
    fd.ioctl(lib.KVM_SET_SREGS2, "KVM_SET_SREGS2", sregs)


def _set_msrs(fd: Fd, state: dict) -> list[int]:
    saved = {entry["index"]: entry["data"] for entry in _msr_entries(state)}
    deadline = saved.pop(MSR_TSC_DEADLINE, None)
    entries = [(MSR_TSC, state["env.tsc"]), *saved.items()]
    if deadline is not None:  # counts against the TSC, so after it
        entries.append((MSR_TSC_DEADLINE, deadline))
    refused = kvm.set_msrs(fd, entries)
    return [index for index in refused if saved.get(index)]


def _msr_entries(state: dict) -> list[dict]:
    msrs = state.get(x86.VMSTATE_MSRS.name)
    return msrs["entries"] if msrs else []


def _set_events(fd: Fd, data: bytes) -> None:
    events = ffi.new("struct kvm_vcpu_events *")
    ffi.buffer(events)[:] = data
    # KVM_GET_VCPU_EVENTS reports what is there; writing it back needs each part marked as meant.
    events.flags |= lib.KVM_VCPUEVENT_VALID_NMI_PENDING | lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    fd.ioctl(lib.KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS", events)


# The kernel's PIC has no single mode.
KERNEL_PIC_FIELDS = tuple(name for name in PIC_FIELDS if name != "single_mode")
PIT_FIELDS = (
    "count",
    "latched_count",
    "count_latched",
    "status_latched",
    "status",
    "read_state",
    "write_state",
    "write_latch",
    "rw_mode",
    "mode",
    "bcd",
    "gate",
    "count_load_time",
)
CHIP_IDS = {
    "i8259-0": lib.KVM_IRQCHIP_PIC_MASTER,
    "i8259-1": lib.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": lib.KVM_IRQCHIP_IOAPIC,
}


def get_chip(vm: Fd, chip: str) -> dict:
    """Reads one in-kernel chip, by the fields of its device's vmstate."""
    if chip == "kvmclock":
        clock = kvm.get_struct(vm, "kvm_clock_data", "KVM_GET_CLOCK", lib.KVM_GET_CLOCK)
        return {"clock": clock.clock}
    if chip == "i8254":
        pit = kvm.get_struct(vm, "kvm_pit_state2", "KVM_GET_PIT2", lib.KVM_GET_PIT2)
        return {
            "channels": [
                {name: getattr(channel, name) for name in PIT_FIELDS} for channel in pit.channels
            ],
            "flags": pit.flags,
        }
    irqchip = ffi.new("struct kvm_irqchip *", {"chip_id": CHIP_IDS[chip]})
    vm.ioctl(lib.KVM_GET_IRQCHIP, "KVM_GET_IRQCHIP", irqchip)
    if chip == "ioapic":
        ioapic = irqchip.chip.ioapic
        return {
            "id": ioapic.id,
            "ioregsel": ioapic.ioregsel,
            "unused1": 0,
            "irr": ioapic.irr,
            "ioredtbl": [entry.bits for entry in ioapic.redirtbl],
        }
    pic = irqchip.chip.pic
    return {"single_mode": 0} | {name: getattr(pic, name) for name in KERNEL_PIC_FIELDS}


def set_chip(vm: Fd, chip: str, state: dict) -> None:
    """The inverse of `get_chip`."""
    if chip == "kvmclock":
        clock = ffi.new("struct kvm_clock_data *", {"clock": state["clock"]})
        vm.ioctl(lib.KVM_SET_CLOCK, "KVM_SET_CLOCK", clock)
        return
    if chip == "i8254":
        pit = ffi.new("struct kvm_pit_state2 *", {"flags": state["flags"]})
        for channel, saved in zip(pit.channels, state["channels"], strict=True):
            for name in PIT_FIELDS:
                setattr(channel, name, saved[name])
        vm.ioctl(lib.KVM_SET_PIT2, "KVM_SET_PIT2", pit)
        return
    irqchip = ffi.new("struct kvm_irqchip *", {"chip_id": CHIP_IDS[chip]})
    if chip == "ioapic":
        ioapic = irqchip.chip.ioapic
        ioapic.base_address = 0xFEC00000
        ioapic.id = state["id"]
        ioapic.ioregsel = state["ioregsel"]
        ioapic.irr = state["irr"]
        for i, bits in enumerate(state["ioredtbl"]):
            ioapic.redirtbl[i].bits = bits
    else:
        pic = irqchip.chip.pic
        for name in KERNEL_PIC_FIELDS:
            setattr(pic, name, state[name])
        pic.elcr_mask = PIC_ELCR_MASKS[irqchip.chip_id]
    vm.ioctl(lib.KVM_SET_IRQCHIP, "KVM_SET_IRQCHIP", irqchip)
