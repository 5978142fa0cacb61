"""The 8259 pair: priorities, cascade, modes, state."""

from __future__ import annotations

import pytest
from described import description_of, golden
from fake_platform import SteppedPlatform

from cpr.accel.irqchip import PIC_FIELDS
from cpr.devices.i8259 import I8259Pair

MASTER, MASTER_DATA, SLAVE, SLAVE_DATA = 0x20, 0x21, 0xA0, 0xA1
EOI, ROTATE_ON_EOI = 0x20, 0xA0
READ_IRR, READ_ISR = 0x0A, 0x0B


@pytest.fixture
def platform() -> SteppedPlatform:
    return SteppedPlatform()


@pytest.fixture
def pair(platform: SteppedPlatform) -> I8259Pair:
    """A pair that is set up as a BIOS does: vectors 0x08 and 0x70, all inputs enabled."""
    pair = make_pair(platform)
    set_up(platform)
    return pair


def make_pair(platform: SteppedPlatform) -> I8259Pair:
    pair = I8259Pair()
    for device in (pair.master, pair.slave):
        device.realize(platform)
        device.reset()
    return pair


def set_up(platform: SteppedPlatform, icw4: int = 0x01) -> None:
    platform.outb(MASTER, 0x11)
    platform.outb(MASTER_DATA, 0x08, 0x04, icw4, 0x00)
    platform.outb(SLAVE, 0x11)
    platform.outb(SLAVE_DATA, 0x70, 0x02, icw4, 0x00)


def pulse(pair: I8259Pair, irq: int) -> None:
    pair.set_irq(irq, True)
    pair.set_irq(irq, False)


def test_one_interrupt(platform: SteppedPlatform, pair: I8259Pair) -> None:
    assert not pair.pending()
    pair.set_irq(3, True)
    assert pair.pending()
    assert pair.acknowledge() == 0x0B
    assert not pair.pending()
    platform.outb(MASTER, READ_ISR)
    assert platform.inb(MASTER) == 0x08
    platform.outb(MASTER, EOI)
    assert platform.inb(MASTER) == 0
    assert not pair.pending()  # an edge counts once


def test_lower_numbers_come_first_and_interrupt_others(
    platform: SteppedPlatform, pair: I8259Pair
) -> None:
    pulse(pair, 5)
    pulse(pair, 3)
    assert pair.acknowledge() == 0x0B
    assert not pair.pending()
    pulse(pair, 1)
    assert pair.acknowledge() == 0x09
    platform.outb(MASTER, EOI)
    assert not pair.pending()
    platform.outb(MASTER, EOI)
    assert pair.acknowledge() == 0x0D


def test_slave(platform: SteppedPlatform, pair: I8259Pair) -> None:
    pulse(pair, 12)
    assert pair.acknowledge() == 0x74
    platform.outb(MASTER, READ_ISR)
    platform.outb(SLAVE, READ_ISR)
    assert (platform.inb(MASTER), platform.inb(SLAVE)) == (0x04, 0x10)
    pulse(pair, 9)
    assert not pair.pending()  # the master has the cascade in service
    platform.outb(SLAVE, EOI)
    platform.outb(MASTER, EOI)
    assert pair.acknowledge() == 0x71


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself(
    platform: SteppedPlatform, pair: I8259Pair
) -> None:
    set_up(platform, icw4=0x11)
    pulse(pair, 12)
    assert pair.acknowledge() == 0x74
    pulse(pair, 9)
    assert pair.acknowledge() == 0x71


def test_mask(platform: SteppedPlatform, pair: I8259Pair) -> None:
    platform.outb(MASTER_DATA, 0x08)
    assert platform.inb(MASTER_DATA) == 0x08
    pulse(pair, 3)
    assert not pair.pending()
    platform.outb(MASTER, READ_IRR)
    assert platform.inb(MASTER) == 0x08
    platform.outb(MASTER_DATA, 0x00)
    assert pair.acknowledge() == 0x0B


def test_interrupt_that_has_gone_is_spurious(platform: SteppedPlatform, pair: I8259Pair) -> None:
    assert pair.acknowledge() == 0x0F
    platform.outb(MASTER, READ_ISR)
    assert platform.inb(MASTER) == 0


def test_level_triggered_input(platform: SteppedPlatform, pair: I8259Pair) -> None:
    platform.outb(0x4D0, 0xFF)
    platform.outb(0x4D1, 0xFF)
    assert (platform.inb(0x4D0), platform.inb(0x4D1)) == (0xF8, 0xDE)
    pair.set_irq(5, True)
    assert pair.acknowledge() == 0x0D
    platform.outb(MASTER, EOI)
    assert pair.acknowledge() == 0x0D  # the line is still high
    pair.set_irq(5, False)
    platform.outb(MASTER, EOI)
    assert not pair.pending()


def test_automatic_end_of_interrupt(platform: SteppedPlatform, pair: I8259Pair) -> None:
    set_up(platform, icw4=0x03)
    pulse(pair, 3)
    assert pair.acknowledge() == 0x0B
    pulse(pair, 4)
    assert pair.acknowledge() == 0x0C


def test_automatic_rotation(platform: SteppedPlatform, pair: I8259Pair) -> None:
    set_up(platform, icw4=0x03)
    platform.outb(MASTER, 0x80)
    pulse(pair, 3)
    assert pair.acknowledge() == 0x0B
    pulse(pair, 3)
    pulse(pair, 4)
    assert pair.acknowledge() == 0x0C
    platform.outb(MASTER, 0x00)
    assert pair.acknowledge() == 0x0B


def test_rotation(platform: SteppedPlatform, pair: I8259Pair) -> None:
    pulse(pair, 3)
    assert pair.acknowledge() == 0x0B
    platform.outb(MASTER, ROTATE_ON_EOI)
    pulse(pair, 3)
    pulse(pair, 6)
    assert pair.acknowledge() == 0x0E
    platform.outb(MASTER, 0x66)  # specific EOI of 6
    platform.outb(MASTER, 0xC7)  # lowest priority: 7
    pulse(pair, 7)
    assert pair.acknowledge() == 0x0B


def test_special_mask_mode(platform: SteppedPlatform, pair: I8259Pair) -> None:
    pulse(pair, 1)
    assert pair.acknowledge() == 0x09
    pulse(pair, 4)
    assert not pair.pending()
    platform.outb(MASTER, 0x68)
    platform.outb(MASTER_DATA, 0x02)
    assert pair.acknowledge() == 0x0C
    platform.outb(MASTER, 0x48)
    pulse(pair, 5)
    assert not pair.pending()


def test_poll(platform: SteppedPlatform, pair: I8259Pair) -> None:
    platform.outb(MASTER, 0x0C)
    assert platform.inb(MASTER) == 0
    pulse(pair, 3)
    platform.outb(MASTER, 0x0C)
    assert platform.inb(MASTER) == 0x83
    platform.outb(MASTER, READ_ISR)
    assert platform.inb(MASTER) == 0x08


def test_single_mode_has_no_third_word(platform: SteppedPlatform, pair: I8259Pair) -> None:
    platform.outb(MASTER, 0x12)
    platform.outb(MASTER_DATA, 0x20, 0xF7)
    assert platform.inb(MASTER_DATA) == 0xF7
    pulse(pair, 3)
    assert pair.acknowledge() == 0x23


def test_output_is_told_when_it_changes(platform: SteppedPlatform, pair: I8259Pair) -> None:
    levels: list[bool] = []
    pair.on_output = levels.append
    pulse(pair, 14)
    pulse(pair, 3)
    assert levels == [True]
    pair.acknowledge()
    assert levels == [True, False]
    pair.set_irq(16, True)
    assert levels == [True, False]


def test_state_continues_in_a_new_pair(platform: SteppedPlatform, pair: I8259Pair) -> None:
    platform.outb(0x4D1, 0x08)
    pulse(pair, 12)
    pair.acknowledge()
    pair.set_irq(11, True)
    pulse(pair, 0)
    states = [device.save() for device in (pair.master, pair.slave)]
    new_platform = SteppedPlatform()
    new = make_pair(new_platform)
    levels: list[bool] = []
    new.on_output = levels.append
    for device, state in zip((new.master, new.slave), states, strict=True):
        encoded = device.vmstate.encode(state)
        assert len(encoded) == 16
        device.restore(state)
    assert levels == [True]
    assert [device.save() for device in (new.master, new.slave)] == states
    assert new.acknowledge() == 0x08
    new_platform.outb(MASTER, EOI)
    new_platform.outb(SLAVE, EOI)
    new_platform.outb(MASTER, EOI)
    assert new.acknowledge() == 0x73


def test_vmstate_is_that_of_qemu() -> None:
    devices = description_of(golden("memfd1"))["devices"]
    theirs = [device for device in devices if device["name"] == "i8259"]
    pair = I8259Pair()
    for device, their in zip((pair.master, pair.slave), theirs, strict=True):
        assert device.instance_id == their["instance_id"]
        ours = device.vmstate.describe(device.save())
        assert ours == {key: their[key] for key in ("vmsd_name", "version", "fields")}


def test_in_kernel(platform: SteppedPlatform) -> None:
    platform = SteppedPlatform(kernel_irqchip=True)
    pair = make_pair(platform)
    assert not platform.bus.io.regions
    assert set(platform.accel.chips) == {"i8259-0", "i8259-1"}
    state = dict.fromkeys(PIC_FIELDS, 0) | {"imr": 0xFB, "irq_base": 8}
    pair.slave.restore(state)
    assert platform.accel.chips["i8259-1"] == state
    assert pair.slave.save() == state
    pair.slave.unrealize()


def test_unrealize_frees_the_ports(platform: SteppedPlatform, pair: I8259Pair) -> None:
    pair.master.unrealize()
    pair.slave.unrealize()
    assert not platform.bus.io.regions
