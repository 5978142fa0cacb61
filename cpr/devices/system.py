"""The parts of a machine that are no chip but have state: its clocks, and the vCPUs.

Each is a Device, so that the machine saves and restores everything in one way.
"""

from __future__ import annotations

from cpr.accel import x86
from cpr.devices.base import Device, check_range, check_time
from cpr.state.vmstate import VMStateDescription, i64, u64, unused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.accel.base import VCpu
    from cpr.devices.base import Platform


class Timers(Device):
    """The virtual clock."""

    idstr = "timer"
    vmstate = VMStateDescription(
        "timer", 2, 1, (i64("cpu_ticks_offset"), unused(8), i64("cpu_clock_offset"))
    )

    def realize(self, platform: Platform) -> None:
        self._clock = platform.clock

    def save(self) -> dict:
        return {"cpu_ticks_offset": 0, "cpu_clock_offset": self._clock.now()}

    def check(self, state: dict) -> None:
        check_time("cpu_clock_offset", state["cpu_clock_offset"])

    def restore(self, state: dict) -> None:
        self._clock.set(state["cpu_clock_offset"])


class ParavirtualClock(Device):
    """The clock that the accelerator shows its guest; it stands still while the VM is stopped."""

    idstr = "kvmclock"
    vmstate = VMStateDescription("kvmclock", 1, 1, (u64("clock"),))

    def realize(self, platform: Platform) -> None:
        self._accel = platform.accel

    def save(self) -> dict:
        return {"clock": self._accel.get_clock()}

    def restore(self, state: dict) -> None:
        self._accel.set_clock(state["clock"])


class VCpuState(Device):
    """One vCPU's registers, as the section `cpu`."""

    idstr = "cpu"
    of_vcpu = True
    vmstate = x86.VMSTATE_CPU

    def __init__(self, vcpu: VCpu) -> None:
        self.instance_id = vcpu.index
        self._vcpu = vcpu

    def reset(self) -> None:
        self._vcpu.set_state(x86.reset_state(self._vcpu.index))

    def save(self) -> dict:
        return self._vcpu.get_state()

    def check(self, state: dict) -> None:
        """What is wider in the stream than in the processor, and what the accelerator refuses."""
        for name in ("env.ldt", "env.tr", *[f"env.segs[{i}]" for i in range(6)]):
            check_range(f"{name}.selector", _segment(state, name)["selector"], 0, 0xFFFF)
        for name in ("env.gdt", "env.idt"):
            check_range(f"{name}.limit", state[name]["limit"], 0, 0xFFFF)
        check_range("env.tsc_khz", state["env.tsc_khz"], 0, 0xFFFFFFFF)
        self._vcpu.check_state(state)

    def restore(self, state: dict) -> None:
        self._vcpu.set_state(state)


def _segment(state: dict, name: str) -> dict:
    array, bracket, index = name.partition("[")
    segment: dict = state[array][int(index.rstrip("]"))] if bracket else state[array]
    return segment
