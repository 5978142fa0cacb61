"""The TCG accelerator: QEMU's translator as the library of PyPI's `unicorn`, where KVM is missing.

The library is loaded by cpr._native without the Python package around it, whose import takes 50
ms.  Each vCPU is an engine of its own; they take turns of about a millisecond, as in QEMU's
single-threaded TCG, because engines that share RAM have no atomic instructions between them.  What
unicorn leaves out (delivery of interrupts and exceptions, HLT, SYSCALL, a TSC that stands still
while the VM is stopped) is in cpr/_native/tcg*.c.
"""

from __future__ import annotations

import errno
import os
import sys

from cpr._native._cpr import ffi, lib
from cpr.accel import base, x86
from cpr.errors import ConfigError, KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.base import Bus, InterruptSource

LIBRARY = "unicorn/lib/libunicorn.so.2"
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


class TcgVCpu(base.VCpu):
    """One vCPU: an engine, and the C run loop around it.

    `interrupt_source` is asked for external interrupts after `interrupt()`; None has none.
    """

    def __init__(self, vm: Any, index: int) -> None:
        self.index = index
        self.interrupt_source: InterruptSource | None = None
        self._bus: Bus | None = None
        self._error: BaseException | None = None
        self._sipi_vector = 0
        self._apic_base = 0
        self._xcr0 = 0
        self._handle = ffi.new_handle(self)
        problem = ffi.new("const char **")
        self._vcpu = lib.cpr_tcg_vcpu_new(vm, index, self._handle, problem)
        if self._vcpu == ffi.NULL:
            raise ConfigError(f"{LIBRARY} cannot make vCPU {index}: {_text(problem[0])}")
        self.set_state(x86.reset_state(index))

    def run(self, bus: Bus) -> str:
        self._bus = bus
        while True:
            reason = lib.cpr_tcg_run(self._vcpu)
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if reason == lib.CPR_TCG_EVENT:
                self._take_events()
            elif reason == lib.CPR_TCG_KICKED:
                return base.KICKED
            elif reason == lib.CPR_TCG_SHUTDOWN:
                return base.SHUTDOWN
            else:
                raise self._problem()

    def _problem(self) -> KernelError:
        text = _text(lib.cpr_tcg_problem(self._vcpu))
        rip = self._read_state().rip
        return KernelError(
            f"uc_emu_start on vCPU {self.index} at RIP {rip:#x}: {text}",
            errno.EIO,
            "the guest is stopped and can still be examined",
        )

    def kick(self) -> None:
        lib.cpr_tcg_request(self._vcpu, lib.CPR_TCG_KICK)

    def interrupt(self) -> None:
        lib.cpr_tcg_request(self._vcpu, lib.CPR_TCG_INTERRUPT)

    def init(self) -> None:
        """The INIT signal: the registers are reset, and all but vCPU 0 wait for SIPI.

        From any thread, like `sipi`; it takes effect when the vCPU runs or its state is read.
        """
        lib.cpr_tcg_request(self._vcpu, lib.CPR_TCG_INIT)

    def sipi(self, vector: int) -> None:
        """The start-up IPI: a vCPU that waits for it starts in real mode at `vector` << 12."""
        self._sipi_vector = vector
        lib.cpr_tcg_request(self._vcpu, lib.CPR_TCG_SIPI)

    def _take_events(self) -> None:
        events = lib.cpr_tcg_take_requests(self._vcpu, lib.CPR_TCG_INIT | lib.CPR_TCG_SIPI)
        if events & lib.CPR_TCG_INIT:
            self._apply_init()
        if events & lib.CPR_TCG_SIPI:
            self._apply_sipi()

    def _apply_init(self) -> None:
        """INIT keeps the FPU, the MSRs and the TSC (Intel SDM vol. 3, table 10-1)."""
        old = self._read_state()
        state = x86.reset_state(self.index)
        state["env.xsave_buf"] = _xsave_area(old)
        state["env.tsc"] = old.tsc
        if self.index:
            state["env.mp_state"] = x86.MP_INIT_RECEIVED
        self._write_state(state)

    def _apply_sipi(self) -> None:
        state = self._read_state()
        if state.mp_state in (x86.MP_UNINITIALIZED, x86.MP_INIT_RECEIVED):
            state.segs[x86.CS].selector = self._sipi_vector << 8
            state.segs[x86.CS].base = self._sipi_vector << 12
            state.rip = 0
            state.mp_state = x86.MP_RUNNABLE
            lib.cpr_tcg_set_state(self._vcpu, state)

    def get_state(self) -> dict:
        """The state by `x86.VMSTATE_CPU`; the MSRs are in its subsection."""
        self._take_events()
        state = self._read_state()
        entries = [
            {"index": index, "data": lib.cpr_tcg_read_msr(self._vcpu, index)} for index in MSRS
        ]
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
            "env.apic_base": self._apic_base,
            "env.xcr0": self._xcr0,
            "env.tsc": state.tsc,
            "env.tsc_khz": TSC_KHZ,
            "env.sregs2_flags": 0,
            "env.pdptrs": [0] * 4,
            "env.mp_state": state.mp_state,
            "env.interrupt_shadow": state.shadow,
            "env.a20_mask": state.a20,
            "env.xsave_buf": _xsave_area(state),
            x86.VMSTATE_MSRS.name: {"nmsrs": len(entries), "entries": entries},
        }

    def set_state(self, state: dict) -> None:
        """Takes over a whole state; MSRs that it lacks keep their values.

        INIT and SIPI signals from before are forgotten.
        """
        lib.cpr_tcg_take_requests(self._vcpu, lib.CPR_TCG_INIT | lib.CPR_TCG_SIPI)
        msrs = state.get(x86.VMSTATE_MSRS.name)
        for entry in msrs["entries"] if msrs else ():
            if entry["index"] in MSRS:
                lib.cpr_tcg_write_msr(self._vcpu, entry["index"], entry["data"])
        self._write_state(state)

    def _read_state(self) -> Any:
        state = ffi.new("struct cpr_tcg_state *")
        lib.cpr_tcg_get_state(self._vcpu, state)
        return state

    def _write_state(self, state: dict) -> None:
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
        lib.cpr_tcg_set_state(self._vcpu, native)
        self._apic_base = state["env.apic_base"]
        self._xcr0 = state["env.xcr0"]

    def close(self) -> None:
        lib.cpr_tcg_vcpu_free(self._vcpu)
        self._vcpu = ffi.NULL


class TcgAccelerator(base.Accelerator):
    """One VM without in-kernel devices."""

    name = "tcg"
    kernel_irqchip = False

    def __init__(self) -> None:
        """Raises ConfigError where the library is missing or is not one of unicorn 2.1."""
        path = _find_library()
        problem = lib.unicorn_load(os.fsencode(path))
        if problem != ffi.NULL:
            raise ConfigError(f"{path} cannot be used as the TCG accelerator: {_text(problem)}")
        self._vm = lib.cpr_tcg_new()
        if self._vm == ffi.NULL:
            raise KernelError("calloc", errno.ENOMEM)

    def map_ram(self, address: int, size: int, host_address: int, readonly: bool = False) -> None:
        """Raises KernelError for a range that overlaps another or is not made of whole pages."""
        error = lib.cpr_tcg_map_ram(self._vm, address, size, host_address, readonly)
        if error:
            raise KernelError(
                f"mapping {size:#x} bytes of guest RAM at {address:#x}",
                -error,
                "TCG guests have at most 1 TiB of addresses: give this one less RAM with -m",
            )

    def unmap_ram(self, address: int, size: int) -> None:
        error = lib.cpr_tcg_unmap_ram(self._vm, address, size)
        if error:
            raise KernelError(f"unmapping {size:#x} bytes of guest RAM at {address:#x}", -error)

    def create_vcpu(self, index: int) -> TcgVCpu:
        return TcgVCpu(self._vm, index)

    def close(self) -> None:
        lib.cpr_tcg_free(self._vm)
        self._vm = ffi.NULL


def _find_library() -> str:
    """The path of the library in the installed package `unicorn`."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for folder in [*sys.path, f"{sys.prefix}/lib/{version}/site-packages"]:
        path = os.path.join(folder, LIBRARY)
        if os.path.exists(path):
            return path
    raise ConfigError(
        "the TCG accelerator needs the Python package unicorn, which is not installed; "
        "install it with: pip install 'cpr-vmm[tcg]'"
    )


def _text(string: Any) -> str:
    return ffi.string(string).decode(errors="replace")


def _segment(native: Any) -> dict:
    return x86.segment(native.selector, native.base, native.limit, native.flags)


def _xsave_area(state: Any) -> bytes:
    area = bytearray(x86.XSAVE_SIZE)
    fxsave = ffi.buffer(state.fxsave)
    ymm = ffi.buffer(state.ymm_high)[:]
    area[: len(fxsave)] = fxsave
    area[XSAVE_HEADER] = XSTATE_FPU_SSE
    if any(ymm):
        area[XSAVE_HEADER] |= XSTATE_YMM
        area[XSAVE_YMM : XSAVE_YMM + len(ymm)] = ymm
    return bytes(area)


# The functions that the C run loop calls.  An exception ends `run`, which raises it.


def _on_error(exception: Any, value: Any, traceback: Any) -> None:
    handle = traceback.tb_frame.f_locals["handle"]
    vcpu = ffi.from_handle(handle)
    vcpu._error = value
    vcpu.kick()


@ffi.def_extern(onerror=_on_error)
def cpr_tcg_io_read(handle: Any, port: int, size: int) -> int:
    return ffi.from_handle(handle)._bus.io_read(port, size)


@ffi.def_extern(onerror=_on_error)
def cpr_tcg_io_write(handle: Any, port: int, size: int, value: int) -> None:
    ffi.from_handle(handle)._bus.io_write(port, size, value)


@ffi.def_extern(onerror=_on_error)
def cpr_tcg_mmio_read(handle: Any, address: int, size: int) -> int:
    return ffi.from_handle(handle)._bus.mmio_read(address, size)


@ffi.def_extern(onerror=_on_error)
def cpr_tcg_mmio_write(handle: Any, address: int, size: int, value: int) -> None:
    ffi.from_handle(handle)._bus.mmio_write(address, size, value)


@ffi.def_extern(error=-1, onerror=_on_error)
def cpr_tcg_take_interrupt(handle: Any) -> int:
    vcpu = ffi.from_handle(handle)
    source = vcpu.interrupt_source
    if source is None or not source.pending():
        return -1
    vector = source.acknowledge()
    if source.pending():
        vcpu.interrupt()
    return vector
