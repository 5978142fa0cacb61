"""One vCPU: an engine, the C run loop around it, and the functions that the loop calls."""

from __future__ import annotations

import errno

from cpr._native._tcg import ffi, lib
from cpr.accel import base, x86
from cpr.accel.tcg.state import MSRS, from_native, to_native, xsave_area
from cpr.errors import ConfigError, KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.base import Bus, InterruptSource

LIBRARY = "unicorn/lib/libunicorn.so.2"


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
            raise ConfigError(f"{LIBRARY} cannot make vCPU {index}: {text(problem[0])}")
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
        problem = text(lib.cpr_tcg_problem(self._vcpu))
        rip = self._read_state().rip
        return KernelError(
            f"uc_emu_start on vCPU {self.index} at RIP {rip:#x}: {problem}",
            errno.EIO,
            "the guest is stopped and can still be examined",
        )

    def kick(self) -> None:
        lib.cpr_tcg_request(self._vcpu, lib.CPR_TCG_KICK)

    def interrupt(self) -> None:
        lib.cpr_tcg_request(self._vcpu, lib.CPR_TCG_INTERRUPT)

    def forget_code(self) -> None:
        lib.cpr_tcg_request(self._vcpu, lib.CPR_TCG_CODE)

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
        state["env.xsave_buf"] = xsave_area(old)
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
        msrs = [{"index": index, "data": lib.cpr_tcg_read_msr(self._vcpu, index)} for index in MSRS]
        return from_native(state, msrs, self._apic_base, self._xcr0)

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
        lib.cpr_tcg_set_state(self._vcpu, to_native(state))
        self._apic_base = state["env.apic_base"]
        self._xcr0 = state["env.xcr0"]

    def close(self) -> None:
        lib.cpr_tcg_vcpu_free(self._vcpu)
        self._vcpu = ffi.NULL


def text(string: Any) -> str:
    return ffi.string(string).decode(errors="replace")


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
