"""Fields of a stream: every value is taken, or refused by the field's name, before it is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from fake_platform import FakePlatform, SteppedPlatform

from cpr.accel import x86
from cpr.devices.apic import ApicBus, LocalApic
from cpr.devices.base import MAX_TIME_NS, Device
from cpr.devices.i8254 import I8254
from cpr.devices.i8259 import I8259Pair
from cpr.devices.ioapic import IOApic
from cpr.devices.pckbd import I8042
from cpr.devices.piix4_pm import Piix4Pm
from cpr.devices.serial import Serial
from cpr.devices.system import Timers, VCpuState
from cpr.state.fields import FixedField, StructField
from cpr.state.vmstate import VMStateDescription

BITS = {"uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64}
SIGNED_BITS = {"int8": 8, "int16": 16, "int32": 32, "int64": 64, "timer": 64}


def extremes(kind: str) -> list[Any]:
    if kind in BITS:
        return [0, 1, (1 << BITS[kind]) - 1, 1 << BITS[kind] - 1]
    if kind in SIGNED_BITS:
        most = 1 << SIGNED_BITS[kind] - 1
        return [0, 1, -1, most - 1, -most, most >> 1, -(most >> 1)]
    return [False, True] if kind == "bool" else []


def places(vmstate: VMStateDescription, state: Any, path: tuple = ()) -> Iterator[tuple]:
    """(path to a value, its extremes), for every number in `state`."""
    for field in vmstate.fields:
        if isinstance(field, StructField):
            value = state[field.name]
            if isinstance(value, list):
                for index, each in enumerate(value):
                    yield from places(field.vmsd, each, (*path, field.name, index))
            else:
                yield from places(field.vmsd, value, (*path, field.name))
        elif isinstance(field, FixedField) and field.kind in {*BITS, *SIGNED_BITS, "bool"}:
            if field.count is None:
                yield (*path, field.name), extremes(field.kind)
            else:
                for index in range(field.count):
                    yield (*path, field.name, index), extremes(field.kind)
    for subsection in vmstate.subsections:
        if subsection.name in state:
            yield from places(subsection, state[subsection.name], (*path, subsection.name))


def changed(state: dict, path: tuple, value: Any) -> dict:
    result = copy.deepcopy(state)
    inside: Any = result
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = value
    return result


def chips(platform: SteppedPlatform) -> list[Device]:
    """All that has registers, wired as in a PC without an irqchip of the kernel's."""
    pic = I8259Pair()
    bus = ApicBus(pic)
    devices = [LocalApic(0, bus), pic.master, pic.slave, IOApic(bus), I8254(), I8042(), Piix4Pm()]
    for device in devices:
        device.realize(platform)
        device.reset()
    return devices


@pytest.mark.parametrize("index", range(7))
def test_every_extreme_is_taken_or_refused_by_name(index: int) -> None:
    platform = SteppedPlatform()
    device = chips(platform)[index]
    saved = device.save()
    assert device.vmstate is not None
    for path, values in places(device.vmstate, saved):
        for value in values:
            if accepts(device, path, changed(saved, path, value)):
                platform.loop.advance(platform.clock.time + 1000)
                use(platform)
                device.vmstate.encode(device.save())


def accepts(device: Device, path: tuple, state: dict) -> bool:
    try:
        device.check(state)
    except ValueError as refusal:
        assert any(str(step) in str(refusal) for step in path[-2:])
        return False
    device.on_stop()
    device.restore(state)
    device.on_run()
    return True


def use(platform: SteppedPlatform) -> None:
    """What a guest may do then: read every register, and let some interrupts come and go."""
    for ports in platform.bus.io.regions:
        for port in range(ports.base, ports.end):
            platform.bus.io_read(port, 1)
    for region in platform.bus.memory.regions:
        for offset in range(0, min(region.end - region.base, 0x400), 0x10):
            address = region.base + offset
            assert 0 <= platform.bus.mmio_read(address, 4) < 1 << 32, hex(address)
    for line in range(16):
        platform.set_irq(line, True)
        platform.set_irq(line, False)


def test_every_extreme_of_a_serial_port() -> None:
    platform = FakePlatform()
    device = Serial(0)
    device.realize(platform)
    device.attach(None)
    saved = device.save()
    for path, values in places(device.vmstate, saved):
        for value in values:
            assert accepts(device, path, changed(saved, path, value))
            for register in range(8):
                platform.bus.io_read(0x3F8 + register, 1)
                platform.bus.io_write(0x3F8 + register, 1, 0x41)
            device.vmstate.encode(device.save())


class VCpu:
    index = 0

    def check_state(self, state: dict) -> None:
        """An accelerator that takes everything."""


REFUSED = [
    ("env.gdt", {"limit": 0x10000}, "env.gdt.limit"),
    ("env.idt", {"limit": 0x7FFFFFFF}, "env.idt.limit"),
    ("env.ldt", {"selector": 0x10000}, "env.ldt.selector"),
    ("env.tr", {"selector": 0xFFFFFFFF}, "env.tr.selector"),
]


def test_registers_that_a_processor_does_not_have() -> None:
    device = VCpuState(VCpu())
    state = x86.reset_state(0)
    device.check(state)
    for name, change, field in REFUSED:
        with pytest.raises(ValueError, match=f"field '{field}' is"):
            device.check({**state, name: {**state[name], **change}})
    segments = [dict(each) for each in state["env.segs"]]
    segments[3]["selector"] = 0x10000
    with pytest.raises(ValueError, match=r"field 'env.segs\[3\].selector' is 65536"):
        device.check({**state, "env.segs": segments})
    with pytest.raises(ValueError, match=r"env\.tsc_khz"):
        device.check({**state, "env.tsc_khz": -1})
    with pytest.raises(ValueError, match=r"env\.interrupt_shadow"):
        device.check({**state, "env.interrupt_shadow": 4})


def test_times_that_no_clock_shows() -> None:
    timers = Timers()
    timers.check({"cpu_clock_offset": MAX_TIME_NS})
    for value in (MAX_TIME_NS + 1, -(1 << 62), 1 << 62):
        with pytest.raises(ValueError, match="'cpu_clock_offset'"):
            timers.check({"cpu_clock_offset": value})
