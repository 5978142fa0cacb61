"""The 8254: counter modes, latches, IRQ 0, the speaker port, state."""

from __future__ import annotations

import pytest
from described import description_of, golden
from fake_platform import SteppedPlatform

from cpr.constants import NS_PER_S
from cpr.devices.i8254 import FREQUENCY, I8254, Channel, PcSpeaker
from cpr.devices.virtual_timer import LEAST_PERIOD_NS

CONTROL = 0x43
MILLISECOND = NS_PER_S // 1000


@pytest.fixture
def platform() -> SteppedPlatform:
    return SteppedPlatform()


@pytest.fixture
def pit(platform: SteppedPlatform) -> I8254:
    pit = I8254()
    pit.realize(platform)
    pit.reset()
    return pit


@pytest.fixture
def speaker(platform: SteppedPlatform, pit: I8254) -> PcSpeaker:
    speaker = PcSpeaker(pit)
    speaker.realize(platform)
    speaker.reset()
    return speaker


def after_ticks(ticks: int) -> int:
    """The ns after which exactly `ticks` clock ticks have passed."""
    return -(-ticks * NS_PER_S // FREQUENCY)


def program(platform: SteppedPlatform, channel: int, mode: int, count: int) -> None:
    platform.outb(CONTROL, channel << 6 | 0x30 | mode << 1)
    platform.outb(0x40 + channel, count & 0xFF, count >> 8)


def read_count(platform: SteppedPlatform, channel: int) -> int:
    platform.outb(CONTROL, channel << 6)
    return platform.inb(0x40 + channel) | platform.inb(0x40 + channel) << 8


def rising_edges(platform: SteppedPlatform) -> int:
    edges = 0
    last = False
    for gsi, level in platform.irqs:
        assert gsi == 0
        edges += level and not last
        last = level
    return edges


@pytest.mark.parametrize("mode", [0, 4])
def test_counts_down_and_on(platform: SteppedPlatform, pit: I8254, mode: int) -> None:
    program(platform, 1, mode, 1000)
    platform.clock.time = after_ticks(300)
    assert read_count(platform, 1) == 700
    platform.clock.time = after_ticks(1001)
    assert read_count(platform, 1) == 0xFFFF


def test_rate_generator_starts_over(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 1, 2, 1000)
    platform.clock.time = after_ticks(2300)
    assert read_count(platform, 1) == 700


def test_square_wave_counts_by_two(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 1, 3, 1000)
    platform.clock.time = after_ticks(300)
    assert read_count(platform, 1) == 400


def test_count_zero_is_65536(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 1, 2, 0)
    platform.clock.time = after_ticks(1)
    assert read_count(platform, 1) == 0xFFFF


def test_modes_6_and_7_are_2_and_3(platform: SteppedPlatform, pit: I8254) -> None:
    for mode in (6, 7):
        program(platform, 1, mode, 10)
        assert pit.channels[1].mode == mode - 4


def test_bytes_of_the_count(platform: SteppedPlatform, pit: I8254) -> None:
    platform.outb(CONTROL, 0x54)  # channel 1, low byte only, mode 2
    platform.outb(0x41, 100)
    assert (pit.channels[1].count, platform.inb(0x41), platform.inb(0x41)) == (100, 100, 100)
    platform.outb(CONTROL, 0x64)  # high byte only
    platform.outb(0x41, 0x12)
    assert (pit.channels[1].count, platform.inb(0x41)) == (0x1200, 0x12)
    program(platform, 1, 2, 0x1234)
    assert [platform.inb(0x41) for _ in range(4)] == [0x34, 0x12, 0x34, 0x12]
    assert platform.inb(CONTROL) == 0


def test_latched_count_stays_until_it_is_read(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 1, 2, 1000)
    platform.outb(CONTROL, 0x40)
    platform.clock.time = after_ticks(100)
    platform.outb(CONTROL, 0x40)  # the first latch holds
    assert platform.inb(0x41) | platform.inb(0x41) << 8 == 1000
    assert read_count(platform, 1) == 900


def test_read_back(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 1, 2, 1000)
    program(platform, 2, 3, 500)
    platform.outb(CONTROL, 0xC0 | 0x0C)  # count and status of channels 1 and 2
    platform.clock.time = after_ticks(10)
    assert platform.inb(0x41) == 0x34
    assert platform.inb(0x41) | platform.inb(0x41) << 8 == 1000
    assert platform.inb(0x42) == 0xB6  # OUT is high
    platform.outb(CONTROL, 0xE0 | 0x02)  # status only, of channel 0
    assert platform.inb(0x40) == 0x80 | 3 << 1


def test_irq_0_ticks_at_the_programmed_rate(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 0, 2, 11932)  # 100 Hz
    platform.irqs.clear()
    platform.loop.advance(NS_PER_S)
    assert rising_edges(platform) == 99  # of 100.0 periods, the last is not quite over
    platform.loop.advance(NS_PER_S + MILLISECOND)
    assert rising_edges(platform) == 100


def test_irq_0_of_a_square_wave(platform: SteppedPlatform, pit: I8254) -> None:
    platform.loop.advance(NS_PER_S)  # 18.2 Hz, which it has from the reset on
    assert rising_edges(platform) == 18


def test_terminal_count_interrupts_once(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 0, 0, 1193)
    platform.loop.advance(after_ticks(1192))
    assert platform.irqs[-1] == (0, False)
    platform.loop.advance(after_ticks(1193))
    assert platform.irqs[-1] == (0, True)
    assert platform.loop.armed() == []
    program(platform, 0, 0, 1193)
    assert platform.irqs[-1] == (0, False)


def test_software_strobe_is_one_pulse(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 0, 4, 1000)
    platform.irqs.clear()
    platform.loop.advance(NS_PER_S)
    assert platform.irqs == [(0, True), (0, False)]


def test_missed_ticks_are_caught_up(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 0, 2, 1193)  # 1 kHz
    platform.irqs.clear()
    platform.clock.time = 100 * MILLISECOND
    platform.loop.advance(100 * MILLISECOND)
    assert rising_edges(platform) == 100
    platform.clock.time = 100 * NS_PER_S  # hopelessly late: what is long past is left out
    platform.loop.advance(100 * NS_PER_S)
    assert rising_edges(platform) in range(600, 603)


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_a_period_below_the_least_has_one_tick_in_each_of_these(
    platform: SteppedPlatform, pit: I8254, mode: int, count: int
) -> None:
    program(platform, 0, mode, count)
    platform.irqs.clear()
    platform.clock.time = 50 * MILLISECOND
    platform.loop.advance(100 * MILLISECOND)
    assert rising_edges(platform) == 50 * MILLISECOND // LEAST_PERIOD_NS + 1


def test_stops_with_the_vm(platform: SteppedPlatform, pit: I8254) -> None:
    program(platform, 0, 2, 1193)
    platform.clock.enabled = False
    pit.on_stop()
    assert platform.loop.armed() == []
    platform.clock.enabled = True
    pit.on_run()
    assert len(platform.loop.armed()) == 1


def test_gate_of_channel_2(platform: SteppedPlatform, pit: I8254, speaker: PcSpeaker) -> None:
    program(platform, 2, 1, 1000)  # the one-shot
    platform.clock.time = after_ticks(500)
    platform.outb(0x61, 0x01)
    assert platform.inb(0x61) & 0x20
    platform.clock.time += after_ticks(999)
    assert platform.inb(0x61) & 0x20
    platform.clock.time += after_ticks(2)
    assert not platform.inb(0x61) & 0x20


def test_gate_does_not_restart_the_terminal_count(
    platform: SteppedPlatform, pit: I8254, speaker: PcSpeaker
) -> None:
    program(platform, 2, 0, 1000)
    platform.clock.time = after_ticks(500)
    platform.outb(0x61, 0x01)
    assert read_count(platform, 2) == 500


def test_speaker_port(platform: SteppedPlatform, pit: I8254, speaker: PcSpeaker) -> None:
    program(platform, 2, 0, 1000)
    assert [platform.inb(0x61) for _ in range(3)] == [0x10, 0x00, 0x10]
    platform.outb(0x61, 0x03)
    assert platform.inb(0x61) & 0x0F == 0x03
    speaker.unrealize()
    assert platform.bus.io.find(0x61) is None


def test_state_continues_in_a_new_one(
    platform: SteppedPlatform, pit: I8254, speaker: PcSpeaker
) -> None:
    program(platform, 0, 2, 11932)
    program(platform, 1, 3, 0x1234)
    platform.outb(0x41, 0x55)  # half a count
    platform.outb(0x61, 0x02)
    platform.loop.advance(5 * MILLISECOND)
    platform.outb(CONTROL, 0x40)
    platform.clock.enabled = False
    pit.on_stop()
    states = [pit.save(), speaker.save()]

    new_platform = SteppedPlatform()
    new_platform.clock.enabled = False
    new_platform.clock.time = platform.clock.time
    new = I8254()
    new.realize(new_platform)
    new_speaker = PcSpeaker(new)
    new_speaker.realize(new_platform)
    new.restore(states[0])
    new_speaker.restore(states[1])
    assert [new.save(), new_speaker.save()] == states
    assert new_platform.loop.armed() == []
    new_platform.clock.enabled = True
    new.on_run()
    new_platform.loop.advance(after_ticks(11932))
    assert rising_edges(new_platform) == 1
    assert new_platform.inb(0x61) & 0x02
    new_platform.outb(0x41, 0x66)
    assert new.channels[1].count == 0x6655


def test_vmstates_are_those_of_qemu(pit: I8254, speaker: PcSpeaker) -> None:
    devices = description_of(golden("memfd1"))["devices"]
    for device in (pit, speaker):
        their = next(entry for entry in devices if entry["name"] == device.idstr)
        ours = device.vmstate.describe(device.save())
        assert ours == {key: their[key] for key in ("vmsd_name", "version", "fields")}


def kernel_state(load_time: int, flags: int) -> dict:
    """What KVM gives: channels without the time of the next transition."""
    channel = Channel()
    names = [name for name in Channel.__slots__ if name != "next_transition_time"]
    state = {name: getattr(channel, name) for name in names} | {"count_load_time": load_time}
    return {"channels": [dict(state) for _ in range(3)], "flags": flags}


def test_in_kernel() -> None:
    """The accelerator's times are from now, the section's of the virtual clock."""
    platform = SteppedPlatform(kernel_irqchip=True)
    platform.clock.time = 1000
    pit = I8254()
    speaker = PcSpeaker(pit)
    for device in (pit, speaker):
        device.realize(platform)
        device.reset()
    assert not platform.bus.io.regions
    loaded = platform.accel.chips["i8254"]
    assert loaded["channels"][0]["count_load_time"] == 0

    platform.accel.chips["i8254"] = kernel_state(-300, 2)
    state = pit.save()
    assert state["channels"][2]["count_load_time"] == 700
    assert state["channels[0].next_transition_time"] == 700 + after_ticks(0x8000)
    assert speaker.save()["data_on"] == 1

    new = I8254()
    new_speaker = PcSpeaker(new)
    new.realize(platform)
    new_speaker.realize(platform)
    new.restore(state)
    new_speaker.restore(speaker.save())
    loaded = platform.accel.chips["i8254"]
    assert loaded["flags"] == 2
    assert [channel["count_load_time"] for channel in loaded["channels"]] == [-300] * 3


def test_unrealize(platform: SteppedPlatform, pit: I8254) -> None:
    pit.unrealize()
    assert not platform.bus.io.regions
    assert platform.loop.armed() == []
