"""The structs that KVM has for parts of a vCPU, to and from the fields of `x86.VMSTATE_CPU`.

Each part is a pair get_PART(vcpu) and set_PART(vcpu, state); `state` has the order of the parts.
"""

from __future__ import annotations

from cpr._native._cpr import ffi, lib
from cpr.accel import x86
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.kvm.vcpu import KvmVCpu

# env.regs in x86.RAX … order, by the names of struct kvm_regs.
GPR_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi") + tuple(
    f"r{number}" for number in range(8, 16)
)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
MP_STATE = kvm.StateStruct("kvm_mp_state", "MP_STATE")
EVENTS = kvm.StateStruct("kvm_vcpu_events", "VCPU_EVENTS")
LAPIC_REGISTERS = kvm.StateStruct("kvm_lapic_state", "LAPIC")
DEBUG = kvm.StateStruct("kvm_debugregs", "DEBUGREGS")
XSAVE = kvm.StateStruct("kvm_xsave", "XSAVE")
XCRS = kvm.StateStruct("kvm_xcrs", "XCRS")
SREGS = kvm.StateStruct("kvm_sregs2", "SREGS2")
REGS = kvm.StateStruct("kvm_regs", "REGS")

XCR0 = 0
LAPIC = "apic.regs"
"""The local APIC's registers in a vCPU's whole state; their section in the stream is `apic`."""


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


def get_tsc_khz(vcpu: KvmVCpu) -> dict:
    return {"env.tsc_khz": vcpu.tsc_khz()}


def set_tsc_khz(vcpu: KvmVCpu, state: dict) -> None:
    """A guest that was saved without a frequency, or reset, keeps the host's."""
    wanted = state["env.tsc_khz"]
    if wanted and wanted != vcpu.tsc_khz():
        remedy = f"the guest's TSC has {wanted} kHz, which this host cannot give it"
        vcpu.fd.ioctl(lib.KVM_SET_TSC_KHZ, "KVM_SET_TSC_KHZ", wanted, remedy)
        vcpu.forget_tsc_khz()


def get_regs(vcpu: KvmVCpu) -> dict:
    regs = REGS.get(vcpu.fd)
    return {
        "env.regs": [getattr(regs, name) for name in GPR_NAMES],
        "env.eip": regs.rip,
        "env.eflags": regs.rflags,
    }


def set_regs(vcpu: KvmVCpu, state: dict) -> None:
    regs = REGS.new()
    for name, value in zip(GPR_NAMES, state["env.regs"], strict=True):
        setattr(regs, name, value)
    regs.rip = state["env.eip"]
    regs.rflags = state["env.eflags"]
    REGS.set(vcpu.fd, regs)


def get_sregs(vcpu: KvmVCpu) -> dict:
    sregs = SREGS.get(vcpu.fd)
    return {
        "env.segs": [get_segment(getattr(sregs, name)) for name in SEGMENT_NAMES],
        "env.ldt": get_segment(sregs.ldt),
        "env.tr": get_segment(sregs.tr),
        "env.gdt": x86.segment(base=sregs.gdt.base, limit=sregs.gdt.limit),
        "env.idt": x86.segment(base=sregs.idt.base, limit=sregs.idt.limit),
        "env.cr": [sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4],
        "env.cr8": sregs.cr8,
        "env.efer": sregs.efer,
        "env.apic_base": sregs.apic_base,
        "env.sregs2_flags": sregs.flags,
        "env.pdptrs": list(sregs.pdptrs),
        "env.a20_mask": 1,  # KVM has no A20 gate
    }


def set_sregs(vcpu: KvmVCpu, state: dict) -> None:
    sregs = SREGS.new()
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
    SREGS.set(vcpu.fd, sregs)


def get_xcr0(vcpu: KvmVCpu) -> dict:
    xcrs = XCRS.get(vcpu.fd)
    values = {xcrs.xcrs[i].xcr: xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs)}
    return {"env.xcr0": values.get(XCR0, 1)}


def set_xcr0(vcpu: KvmVCpu, state: dict) -> None:
    xcrs = ffi.new("struct kvm_xcrs *", {"nr_xcrs": 1})
    xcrs.xcrs[0].xcr = XCR0
    xcrs.xcrs[0].value = state["env.xcr0"]
    XCRS.set(vcpu.fd, xcrs)


def get_xsave(vcpu: KvmVCpu) -> dict:
    xsave = XSAVE.get(vcpu.fd)
    return {"env.xsave_buf": bytes(ffi.buffer(xsave)[0 : x86.XSAVE_SIZE])}


def set_xsave(vcpu: KvmVCpu, state: dict) -> None:
    xsave = XSAVE.new()
    ffi.buffer(xsave)[0 : x86.XSAVE_SIZE] = state["env.xsave_buf"]
    XSAVE.set(vcpu.fd, xsave)


def get_debug(vcpu: KvmVCpu) -> dict:
    debug = DEBUG.get(vcpu.fd)
    return {"env.dr": [*debug.db, 0, 0, debug.dr6, debug.dr7]}


def set_debug(vcpu: KvmVCpu, state: dict) -> None:
    debug = DEBUG.new()
    for i in range(4):
        debug.db[i] = state["env.dr"][i]
    debug.dr6, debug.dr7 = state["env.dr"][6:8]
    DEBUG.set(vcpu.fd, debug)


def get_lapic(vcpu: KvmVCpu) -> dict:
    lapic = LAPIC_REGISTERS.get(vcpu.fd)
    return {LAPIC: bytes(ffi.buffer(lapic.regs))}


def set_lapic(vcpu: KvmVCpu, state: dict) -> None:
    lapic = LAPIC_REGISTERS.new()
    ffi.buffer(lapic.regs)[:] = state[LAPIC]
    LAPIC_REGISTERS.set(vcpu.fd, lapic)


def get_events(vcpu: KvmVCpu) -> dict:
    """Exceptions, interrupts and NMIs in flight, and what blocks them."""
    events = EVENTS.get(vcpu.fd)
    return {
        "env.interrupt_shadow": events.interrupt.shadow,
        x86.VMSTATE_EVENTS.name: {"kvm_vcpu_events": bytes(ffi.buffer(events)[:])},
    }


def set_events(vcpu: KvmVCpu, state: dict) -> None:
    events = EVENTS.new()
    ffi.buffer(events)[:] = state[x86.VMSTATE_EVENTS.name]["kvm_vcpu_events"]
    events.interrupt.shadow = state["env.interrupt_shadow"] or events.interrupt.shadow
    make_settable(events)
    EVENTS.set(vcpu.fd, events)


def make_settable(events: Any) -> None:
    """The flags say which fields count; those for SMM and payloads stay what KVM had given.

    The vector of a SIPI is never among what KVM gives: reading mp_state makes it take the SIPI in.
    """
    events.flags &= ~lib.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    events.flags |= lib.KVM_VCPUEVENT_VALID_NMI_PENDING | lib.KVM_VCPUEVENT_VALID_SHADOW


def get_mp_state(vcpu: KvmVCpu) -> dict:
    mp_state = MP_STATE.get(vcpu.fd)
    return {"env.mp_state": mp_state.mp_state}


def set_mp_state(vcpu: KvmVCpu, state: dict) -> None:
    mp_state = ffi.new("struct kvm_mp_state *", {"mp_state": state["env.mp_state"]})
    MP_STATE.set(vcpu.fd, mp_state)
