"""The small devices: port 92, i8042, power management, debug ports."""

from __future__ import annotations

import importlib

import pytest
from fake_platform import FakePlatform

from cpr.config.device_table import DEVICES, DeviceModel
from cpr.devices.debug_exit import DebugExit
from cpr.devices.debugcon import DebugCon
from cpr.devices.pckbd import I8042
from cpr.devices.piix4_pm import Piix4Pm
from cpr.devices.port92 import Port92
from cpr.state.reader import BytesReader

RESET = ("reset", True, "guest-reset")


@pytest.fixture
def platform():
    return FakePlatform()


def realized(device, platform):
    device.realize(platform)
    device.reset()
    return device


def test_port92_resets_on_the_rising_edge_only(platform):
    realized(Port92(), platform)
    platform.bus.io_write(0x92, 1, 0x02)
    assert platform.bus.io_read(0x92, 1) == 0x02
    assert platform.requests == []
    platform.bus.io_write(0x92, 1, 0x03)
    platform.bus.io_write(0x92, 1, 0x03)
    assert platform.requests == [RESET]


@pytest.mark.parametrize("writes", [[(0x64, 0xFE)], [(0x64, 0xD1), (0x60, 0x02)]])
def test_i8042_resets_the_guest(platform, writes):
    realized(I8042(), platform)
    for port, value in writes:
        platform.bus.io_write(port, 1, value)
    assert platform.requests == [RESET]


def test_i8042_self_test_and_mode(platform):
    realized(I8042(), platform)
    io = platform.bus
    io.io_write(0x64, 1, 0xAA)
    assert io.io_read(0x64, 1) & 1
    assert io.io_read(0x60, 1) == 0x55
    assert not io.io_read(0x64, 1) & 1
    io.io_write(0x64, 1, 0x60)
    io.io_write(0x60, 1, 0x41)
    io.io_write(0x64, 1, 0x20)
    assert io.io_read(0x60, 1) == 0x41


def test_power_button_and_soft_off(platform):
    device = realized(Piix4Pm(), platform)
    io = platform.bus
    device.on_powerdown()
    assert not platform.lines.get(9)
    io.io_write(0x602, 2, 0x100)
    assert platform.lines[9]
    io.io_write(0x600, 2, 0x100)
    assert not platform.lines[9]
    io.io_write(0x604, 2, 0x2000)
    io.io_write(0x604, 2, 0x2400)
    assert platform.requests == [("shutdown", True, "guest-shutdown"), ("suspend",)]


def test_pm_timer_runs_with_the_guest(platform):
    realized(Piix4Pm(), platform)
    first = platform.bus.io_read(0x608, 4)
    while platform.bus.io_read(0x608, 4) == first:
        pass
    platform.clock.disable()
    assert platform.bus.io_read(0x608, 4) == platform.bus.io_read(0x608, 4)


@pytest.mark.parametrize(("value", "status"), [(0, 1), (0x10, 33), (0x42, 133)])
def test_debug_exit_status(platform, value, status):
    realized(DebugExit(), platform)
    platform.bus.io_write(0x501, 1, value)
    assert platform.requests == [("exit", status)]


def test_debugcon_writes_and_reads_back(platform):
    class Sink:
        written = b""
        alone = False

        def write(self, data: bytes) -> None:
            self.written += data
            self.alone = self.alone or platform.keeps_vcpus_away()

    device, sink = realized(DebugCon(), platform), Sink()
    platform.bus.io_write(0xE9, 1, ord("a"))
    device.attach(sink)
    assert sink.alone  # or a newer byte would come before this one
    platform.bus.io_write(0xE9, 1, ord("b"))
    assert sink.written == b"ab"
    assert platform.bus.io_read(0xE9, 1) == 0xE9


@pytest.mark.parametrize("make", [Port92, I8042, Piix4Pm])
def test_state_round_trips(platform, make):
    device = realized(make(), platform)
    platform.bus.io_write(0x92, 1, 0x02)
    platform.bus.io_write(0x64, 1, 0xAA)
    platform.bus.io_write(0x602, 2, 0x100)
    body = device.vmstate.encode(device.save())
    other = realized(make(), FakePlatform())
    other.restore(device.vmstate.decode(BytesReader(body), device.vmstate.version_id))
    assert other.save() == device.save()


@pytest.mark.parametrize("model", DEVICES.values(), ids=DEVICES)
def test_a_row_of_the_table_names_a_module_that_makes_the_device(model: DeviceModel) -> None:
    assert callable(importlib.import_module(model.module).create)
    assert (model.chardev is not None) == ("chardev" in model.properties)
