"""A vCPU's state between the engine's struct cpr_tcg_state and `x86.VMSTATE_CPU`."""

from __future__ import annotations

from cpr._native._tcg import ffi
from cpr.accel import x86

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TSC_KHZ = 1_000_000  # the TSC counts ns

# Where the standard XSAVE format has its header and the upper halves of the YMM registers
# (Intel SDM vol. 1, 13.4), and the bits of the header's first field.
XSAVE_HEADER = 512
XSAVE_YMM = 576
XSTATE_FPU_SSE = 3
XSTATE_YMM = 4

# The MSRs that the engine keeps and that are no fields of the `cpu` section: SYSENTER_CS, _ESP and
# _EIP, MISC_ENABLE, the MTRRs, PAT, STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE and TSC_AUX.
MSRS = (
    *range(0x174, 0x177),
    0x1A0,
    *range(0x200, 0x210),
    0x250,
    0x258,
    0x259,
    *range(0x268, 0x270),
    0x277,
    0x2FF,
    *range(0xC0000081, 0xC0000085),
    0xC0000102,
    0xC0000103,
)


def from_native(state: Any, msrs: list[dict], apic_base: int, xcr0: int) -> dict:
    """The fields of the section; `msrs` are in its subsection."""
    return {
        "env.regs": list(state.regs),
        "env.eip": state.rip,
        "env.eflags": state.rflags,
        "env.segs": [_segment(segment) for segment in state.segs],
        "env.ldt": _segment(state.ldt),
        "env.tr": _segment(state.tr),
        "env.gdt": _segment(state.gdt),
        "env.idt": _segment(state.idt),
        "env.cr": list(state.cr),
        "env.cr8": 0,
        "env.dr": list(state.dr),
        "env.efer": state.efer,
        "env.apic_base": apic_base,
        "env.xcr0": xcr0,
        "env.tsc": state.tsc,
        "env.tsc_khz": TSC_KHZ,
        "env.sregs2_flags": 0,
        "env.pdptrs": [0] * 4,
        "env.mp_state": state.mp_state,
        "env.interrupt_shadow": state.shadow,
        "env.a20_mask": state.a20,
        "env.xsave_buf": xsave_area(state),
        x86.VMSTATE_MSRS.name: {"nmsrs": len(msrs), "entries": msrs},
    }


def to_native(state: dict) -> Any:
    xsave = state["env.xsave_buf"]
    has_ymm = xsave[XSAVE_HEADER] & XSTATE_YMM
    native = ffi.new(
        "struct cpr_tcg_state *",
        {
            "regs": state["env.regs"],
            "rip": state["env.eip"],
            "rflags": state["env.eflags"],
            "segs": state["env.segs"],
            "ldt": state["env.ldt"],
            "tr": state["env.tr"],
            "gdt": state["env.gdt"],
            "idt": state["env.idt"],
            "cr": state["env.cr"],
            "dr": state["env.dr"],
            "efer": state["env.efer"],
            "shadow": bool(state["env.interrupt_shadow"]),
            "a20": state["env.a20_mask"],
            "tsc": state["env.tsc"],
            "mp_state": state["env.mp_state"],
        },
    )
    ffi.buffer(native.fxsave)[:] = xsave[: len(native.fxsave)]
    if has_ymm:
        ffi.buffer(native.ymm_high)[:] = xsave[XSAVE_YMM : XSAVE_YMM + len(native.ymm_high)]
    return native


def _segment(native: Any) -> dict:
    return x86.segment(native.selector, native.base, native.limit, native.flags)


def xsave_area(state: Any) -> bytes:
    area = bytearray(x86.XSAVE_SIZE)
    fxsave = ffi.buffer(state.fxsave)
    ymm = ffi.buffer(state.ymm_high)[:]
    area[: len(fxsave)] = fxsave
    area[XSAVE_HEADER] = XSTATE_FPU_SSE
    if any(ymm):
        area[XSAVE_HEADER] |= XSTATE_YMM
        area[XSAVE_YMM : XSAVE_YMM + len(ymm)] = ymm
    return bytes(area)
