"""The I/O APIC: redirection, trigger modes, state."""

from __future__ import annotations

import pytest
from described import description_of, golden
from fake_platform import SteppedPlatform

from cpr.devices.ioapic import ADDRESS, IOApic

MASKED, LEVEL = 1 << 16, 1 << 15
REMOTE_IRR = 1 << 14


class FakeApicBus:
    def __init__(self) -> None:
        self.eoi_handlers: list = []
        self.messages: list[tuple] = []

    def deliver(self, *message: object) -> None:
        self.messages.append(message)

    def acknowledge_pic(self) -> int:
        return 0x77


@pytest.fixture
def platform() -> SteppedPlatform:
    return SteppedPlatform()


@pytest.fixture
def bus() -> FakeApicBus:
    return FakeApicBus()


@pytest.fixture
def ioapic(platform: SteppedPlatform, bus: FakeApicBus) -> IOApic:
    ioapic = IOApic(bus)
    ioapic.realize(platform)
    ioapic.reset()
    return ioapic


def read(platform: SteppedPlatform, index: int) -> int:
    platform.writel(ADDRESS, index)
    return platform.readl(ADDRESS + 0x10)


def write(platform: SteppedPlatform, index: int, value: int) -> None:
    platform.writel(ADDRESS, index)
    platform.writel(ADDRESS + 0x10, value)


def redirect(platform: SteppedPlatform, pin: int, low: int, destination: int = 0) -> None:
    write(platform, 0x11 + 2 * pin, destination << 24)
    write(platform, 0x10 + 2 * pin, low)


def test_registers(platform: SteppedPlatform, ioapic: IOApic) -> None:
    assert read(platform, 1) == 0x00170020
    assert read(platform, 0x10) == MASKED
    write(platform, 0, 0x05000000)
    assert read(platform, 0) == 0x05000000
    assert platform.readl(ADDRESS) == 0
    redirect(platform, 23, 0x1A055, 0x12)
    assert (read(platform, 0x3E), read(platform, 0x3F)) == (0x1A055, 0x12000000)
    write(platform, 0x40, 1)  # beyond the table
    assert read(platform, 0x40) == 0


def test_edge(platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic) -> None:
    redirect(platform, 4, 0x34, 1)
    ioapic.set_irq(4, True)
    assert bus.messages == [(1, False, 0, 0x34, False)]
    ioapic.set_irq(4, False)
    ioapic.set_irq(4, True)
    assert len(bus.messages) == 2


def test_edge_at_a_masked_pin_is_lost(
    platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic
) -> None:
    ioapic.set_irq(4, True)
    redirect(platform, 4, 0x34)
    assert not bus.messages


def test_isa_timer_is_on_pin_2(platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic) -> None:
    redirect(platform, 2, 0x22)
    ioapic.set_irq(0, True)
    ioapic.set_irq(24, True)  # there is no such pin
    assert bus.messages == [(0, False, 0, 0x22, False)]


def test_level_waits_for_the_end_of_interrupt(
    platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic
) -> None:
    redirect(platform, 10, LEVEL | 0x900 | 0x5A, 0x03)  # lowest priority, logical
    ioapic.set_irq(10, True)
    ioapic.set_irq(10, True)
    assert bus.messages == [(3, True, 1, 0x5A, True)]
    assert read(platform, 0x24) & REMOTE_IRR
    bus.eoi_handlers[0](0x5B)
    assert len(bus.messages) == 1
    bus.eoi_handlers[0](0x5A)
    assert len(bus.messages) == 2  # still high
    ioapic.set_irq(10, False)
    bus.eoi_handlers[0](0x5A)
    assert len(bus.messages) == 2
    assert not read(platform, 0x24) & REMOTE_IRR


def test_level_is_sent_when_it_is_unmasked(
    platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic
) -> None:
    redirect(platform, 10, MASKED | LEVEL | 0x5A)
    ioapic.set_irq(10, True)
    assert not bus.messages
    redirect(platform, 10, LEVEL | 0x5A)
    assert len(bus.messages) == 1


def test_eoi_register(platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic) -> None:
    redirect(platform, 10, LEVEL | 0x5A)
    ioapic.set_irq(10, True)
    platform.writel(ADDRESS + 0x40, 0x5A)
    assert len(bus.messages) == 2


def test_external_interrupt_has_the_vector_of_the_pic(
    platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic
) -> None:
    redirect(platform, 1, 0x700)
    ioapic.set_irq(1, True)
    assert bus.messages == [(0, False, 7, 0x77, False)]


def test_state_continues_in_a_new_one(
    platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic
) -> None:
    redirect(platform, 10, LEVEL | 0x5A, 2)
    redirect(platform, 11, MASKED | LEVEL | 0x5B)
    ioapic.set_irq(10, True)
    ioapic.set_irq(11, True)
    state = ioapic.save()
    new_platform = SteppedPlatform()
    new = IOApic(bus)
    new.realize(new_platform)
    new.restore(state)
    assert new.save() == state
    bus.messages.clear()
    new.end_of_interrupt(0x5A)
    assert bus.messages == [(2, False, 0, 0x5A, True)]
    write(new_platform, 0x26, LEVEL | 0x5B)
    assert bus.messages[1:] == [(0, False, 0, 0x5B, True)]


def test_vmstate_is_that_of_qemu(bus: FakeApicBus) -> None:
    devices = description_of(golden("memfd1"))["devices"]
    their = next(device for device in devices if device["name"] == "ioapic")
    ioapic = IOApic(bus)
    ours = ioapic.vmstate.describe(ioapic.save())
    assert ours == {key: their[key] for key in ("vmsd_name", "version", "fields")}


def test_in_kernel(bus: FakeApicBus) -> None:
    platform = SteppedPlatform(kernel_irqchip=True)
    ioapic = IOApic(bus)
    ioapic.realize(platform)
    ioapic.reset()
    assert not platform.bus.memory.regions
    assert platform.accel.chips["ioapic"]["ioredtbl"] == [MASKED] * 24
    state = {"id": 1, "ioregsel": 2, "irr": 3, "ioredtbl": list(range(24))}
    ioapic.restore(state)
    assert ioapic.save() == state
    ioapic.unrealize()


def test_unrealize(platform: SteppedPlatform, bus: FakeApicBus, ioapic: IOApic) -> None:
    ioapic.unrealize()
    assert not platform.bus.memory.regions
    assert not bus.eoi_handlers
