"""The state of an x86 vCPU: its vmstate, its reset values, and segment attribute bits.

Register and segment orders, field names and the packing of segment `flags` are those of QEMU's
`cpu` section; the FPU and vector registers are one XSAVE area in the CPU's standard format
(Intel SDM vol. 1, 13.4), whose first 512 bytes are laid out as by FXSAVE.
"""

from __future__ import annotations

from cpr.state.vmstate import (
    VMStateDescription,
    buffer,
    i64,
    struct_,
    u8,
    u16,
    u32,
    u64,
    varray,
)

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS = range(6)
XSAVE_SIZE = 4096

# mp_state, as KVM_GET_MP_STATE counts (linux/kvm.h).
MP_RUNNABLE = 0
MP_UNINITIALIZED = 1
MP_INIT_RECEIVED = 2
MP_HALTED = 3

# Segment `flags`: bits 8 to 23 of a descriptor's second word, in place (Intel SDM vol. 3, 3.4.5).
FLAG_TYPE_SHIFT = 8
FLAG_S = 1 << 12
FLAG_DPL_SHIFT = 13
FLAG_P = 1 << 15
FLAG_L = 1 << 21
FLAG_DB = 1 << 22
FLAG_G = 1 << 23

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
APIC_BASE_BSP = 1 << 8
APIC_BASE_ENABLE = 1 << 11
APIC_BASE_ADDRESS = 0xFEE00000

VMSTATE_SEGMENT = VMStateDescription(
    "segment", 1, 1, (u32("selector"), u64("base"), u32("limit"), u32("flags"))
)

VMSTATE_MSR = VMStateDescription("cpu/msr_entry", 1, 1, (u32("index"), u64("data")))

# A list of MSRs, as KVM has them beyond those that are fields of the section.
VMSTATE_MSRS = VMStateDescription(
    "cpu/msrs", 1, 1, (u32("nmsrs"), varray("entries", VMSTATE_MSR, "nmsrs"))
)

# Events in flight, as KVM_GET_VCPU_EVENTS gives them (struct kvm_vcpu_events, linux/kvm.h).
EVENTS_SIZE = 64
VMSTATE_EVENTS = VMStateDescription(
    "cpu/kvm_vcpu_events", 1, 1, (buffer("kvm_vcpu_events", EVENTS_SIZE),)
)

VMSTATE_CPUID_ENTRY = VMStateDescription(
    "cpu/cpuid_entry",
    1,
    1,
    tuple(u32(name) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
)

# What the guest is told of its processor, as KVM has it (struct kvm_cpuid_entry2, linux/kvm.h).
VMSTATE_CPUID = VMStateDescription(
    "cpu/cpuid", 1, 1, (u32("nent"), varray("entries", VMSTATE_CPUID_ENTRY, "nent"))
)

SHADOWS = 3  # of interrupts, by MOV SS and STI (KVM_X86_SHADOW_INT_*)

VMSTATE_CPU = VMStateDescription(
    "cpu",
    12,
    12,
    (
        u64("env.regs", 16),
        u64("env.eip"),
        u64("env.eflags"),
        struct_("env.segs", VMSTATE_SEGMENT, 6),
        struct_("env.ldt", VMSTATE_SEGMENT),
        struct_("env.tr", VMSTATE_SEGMENT),
        struct_("env.gdt", VMSTATE_SEGMENT),
        struct_("env.idt", VMSTATE_SEGMENT),
        u64("env.cr", 5),
        u64("env.cr8"),
        u64("env.dr", 8),
        u64("env.efer"),
        u64("env.apic_base"),
        u64("env.xcr0"),
        u64("env.tsc"),
        i64("env.tsc_khz"),
        u32("env.sregs2_flags"),
        u64("env.pdptrs", 4),
        u32("env.mp_state"),
        u16("env.interrupt_shadow"),
        u8("env.a20_mask"),
        buffer("env.xsave_buf", XSAVE_SIZE),
    ),
    subsections=(VMSTATE_MSRS, VMSTATE_EVENTS, VMSTATE_CPUID),
)


def segment(selector: int = 0, base: int = 0, limit: int = 0xFFFF, flags: int = 0) -> dict:
    return {"selector": selector, "base": base, "limit": limit, "flags": flags}


def real_mode_segment(selector: int) -> dict:
    """A data segment as real mode loads it: base is 16 times the selector."""
    return segment(selector, selector << 4, 0xFFFF, FLAG_P | FLAG_S | 3 << FLAG_TYPE_SHIFT)


def reset_state(index: int) -> dict:
    """The state after a reset (Intel SDM vol. 3, table 10-1).

    vCPU 0 is the bootstrap processor and runnable at the reset vector; the others wait for INIT
    and SIPI.
    """
    data = real_mode_segment(0)
    code = segment(0xF000, 0xFFFF0000, 0xFFFF, FLAG_P | FLAG_S | 0xB << FLAG_TYPE_SHIFT)
    xsave = bytearray(XSAVE_SIZE)
    xsave[0:2] = (0x037F).to_bytes(2, "little")  # FCW
    xsave[24:28] = (0x1F80).to_bytes(4, "little")  # MXCSR
    xsave[512] = 3  # XSTATE_BV: x87 and SSE are in the area
    regs = [0] * 16
    regs[RDX] = 0x600
    apic_base = APIC_BASE_ADDRESS | APIC_BASE_ENABLE | (APIC_BASE_BSP if index == 0 else 0)
    return {
        "env.regs": regs,
        "env.eip": 0xFFF0,
        "env.eflags": 2,
        "env.segs": [dict(data), code, dict(data), dict(data), dict(data), dict(data)],
        "env.ldt": segment(flags=FLAG_P | 2 << FLAG_TYPE_SHIFT),
        "env.tr": segment(flags=FLAG_P | 0xB << FLAG_TYPE_SHIFT),
        "env.gdt": segment(),
        "env.idt": segment(),
        "env.cr": [CR0_ET | CR0_NW | CR0_CD, 0, 0, 0, 0],
        "env.cr8": 0,
        "env.dr": [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400],
        "env.efer": 0,
        "env.apic_base": apic_base,
        "env.xcr0": 1,
        "env.tsc": 0,
        "env.tsc_khz": 0,
        "env.sregs2_flags": 0,
        "env.pdptrs": [0] * 4,
        "env.mp_state": MP_RUNNABLE if index == 0 else MP_UNINITIALIZED,
        "env.interrupt_shadow": 0,
        "env.a20_mask": 1,
        "env.xsave_buf": bytes(xsave),
    }
