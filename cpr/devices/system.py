"""The parts of a machine that are no chip but have state: its clocks, and the vCPUs.

Each is a Device, so that the machine saves and restores everything in one way.
"""

from __future__ import annotations

from cpr.accel import x86
from cpr.devices.base import Device, check_range, check_time
from cpr.state.vmstate import VMStateDescription, i64, u32, u64, unused, vbuffer

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


class GuestClock(Device):
    """When the guest was stopped, by the host's wall clock, for a clock that is to go on.

    Saved and restored where the migration's parameter x-cpr-guest-clock is `advance`.
    """

    idstr = "x-cpr-guest-clock"
    vmstate = VMStateDescription("x-cpr-guest-clock", 1, 1, (i64("stopped_at"),))

    def realize(self, platform: Platform) -> None:
        self._platform = platform

    def needed(self) -> bool:
        wanted = self._platform.catches_up or self._platform.advances_clock()
        return wanted and self._platform.stopped_at is not None

    def save(self) -> dict:
        return {"stopped_at": self._platform.stopped_at or 0}

    def check(self, state: dict) -> None:
        check_range("stopped_at", state["stopped_at"], 0, 1 << 62)

    def restore(self, state: dict) -> None:
        self._platform.stopped_at = state["stopped_at"]
        self._platform.catches_up = True


class ParavirtualClock(Device):
    """The clock that the accelerator shows its guest; it stands still while the VM is stopped."""

    idstr = "kvmclock"
    vmstate = VMStateDescription("kvmclock", 1, 1, (u64("clock"),))

    def realize(self, platform: Platform) -> None:
        self._accel = platform.accel

    @property
    def of_accel(self) -> bool:
        return True

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

    @property
    def of_accel(self) -> bool:
        return True

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
        check_range("env.interrupt_shadow", state["env.interrupt_shadow"], 0, x86.SHADOWS)
        self._vcpu.check_state(state)

    def restore(self, state: dict) -> None:
        self._vcpu.set_state(state)


def _segment(state: dict, name: str) -> dict:
    array, bracket, index = name.partition("[")
    segment: dict = state[array][int(index.rstrip("]"))] if bracket else state[array]
    return segment


class NativeState(Device):
    """A part of the accelerator's state as the kernel has it, for a VM on the same host.

    It takes the place of the sections of the devices that are `of_accel`.
    """

    idstr = "x-cpr-native"
    of_vcpu = True
    vmstate = VMStateDescription("x-cpr-native", 1, 1, (u32("size"), vbuffer("data", "size")))

    def __init__(self, part: int) -> None:
        self.instance_id = part

    def realize(self, platform: Platform) -> None:
        self._accel = platform.accel

    def needed(self) -> bool:
        return self._accel.saves_native

    def save(self) -> dict:
        data = self._accel.get_native(self.instance_id)
        return {"size": len(data), "data": data}

    def check(self, state: dict) -> None:
        size = self._accel.native_size(self.instance_id)
        check_range("size", state["size"], size, size)

    def restore(self, state: dict) -> None:
        self._accel.set_native(self.instance_id, state["data"])
