"""Local APICs: priorities, messages between vCPUs, the timer, LINT0, state."""

from __future__ import annotations

import pytest
from fake_platform import SteppedPlatform

from cpr.devices.apic import ADDRESS, LocalApic
from cpr.devices.apic_bus import ApicBus
from cpr.devices.i8259 import I8259Pair
from cpr.devices.ioapic import IOApic
from cpr.devices.virtual_timer import LEAST_PERIOD_NS

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_ERROR = 0x320, 0x350, 0x370
INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x380, 0x390, 0x3E0
MASKED, PERIODIC = 1 << 16, 1 << 17
DIVIDE_BY_1, DIVIDE_BY_16 = 0xB, 0x3


class Machine:
    """Local APICs, a PIC pair and an I/O APIC, wired as in a PC."""

    def __init__(self, vcpus: int = 2) -> None:
        self.platform = SteppedPlatform(vcpus=vcpus)
        self.pic = I8259Pair()
        self.bus = ApicBus(self.pic)
        self.apics = [LocalApic(index, self.bus) for index in range(vcpus)]
        self.ioapic = IOApic(self.bus)
        self.devices = [*self.apics, self.pic.master, self.pic.slave, self.ioapic]
        for device in self.devices:
            device.realize(self.platform)
        for device in self.devices:
            device.reset()
        for vcpu in self.platform.vcpus:
            vcpu.calls.clear()

    def read(self, offset: int, vcpu: int = 0) -> int:
        self.platform.vcpu = vcpu
        return self.platform.readl(ADDRESS + offset)

    def write(self, offset: int, value: int, vcpu: int = 0) -> None:
        self.platform.vcpu = vcpu
        self.platform.writel(ADDRESS + offset, value)

    def enable(self) -> None:
        for index in range(len(self.apics)):
            self.write(SVR, 0x1FF, index)

    def send(self, low: int, destination: int = 0, vcpu: int = 0) -> None:
        self.write(ICR_HIGH, destination << 24, vcpu)
        self.write(ICR_LOW, low, vcpu)

    def calls(self, vcpu: int) -> list:
        calls = self.platform.vcpus[vcpu].calls
        taken = list(calls)
        calls.clear()
        return taken


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.enable()
    return machine


def test_registers_after_a_reset() -> None:
    machine = Machine()
    assert [machine.read(ID, vcpu) for vcpu in (0, 1)] == [0, 0x01000000]
    assert machine.read(VERSION) == 0x50014
    assert machine.read(SVR) == 0xFF
    assert machine.read(DFR) == 0xFFFFFFFF
    assert machine.read(LVT_TIMER) == MASKED
    assert [machine.read(LVT_LINT0, vcpu) for vcpu in (0, 1)] == [0x700, MASKED]


def test_only_aligned_doublewords_of_a_vcpu_are_accesses(machine: Machine) -> None:
    region = machine.platform.bus.memory.find(ADDRESS)
    assert region is not None
    read, write = region.read, region.write
    write(TPR, 1, 0x30)
    write(TPR + 4, 4, 0x30)
    assert machine.read(TPR) == 0
    machine.write(TPR, 0x30)
    assert read(TPR, 1) == 0
    machine.platform.vcpu = -1
    assert read(TPR, 4) == 0
    write(TPR, 4, 0)
    assert machine.read(TPR) == 0x30


def test_message_to_another_vcpu(machine: Machine) -> None:
    machine.send(0x4041, destination=1)
    assert "interrupt" in machine.calls(1)
    apic = machine.apics[1]
    assert apic.pending()
    assert not machine.apics[0].pending()
    assert machine.read(IRR + 0x20, 1) == 1 << 1
    assert apic.acknowledge() == 0x41
    assert not apic.pending()
    assert machine.read(IRR + 0x20, 1) == 0
    assert machine.read(ISR + 0x20, 1) == 1 << 1
    assert machine.read(PPR, 1) == 0x40
    machine.write(EOI, 0, 1)
    assert machine.read(ISR + 0x20, 1) == 0
    assert apic.acknowledge() == -1


@pytest.mark.parametrize(("shorthand", "expected"), [(1, {0}), (2, {0, 1, 2}), (3, {1, 2})])
def test_shorthands(shorthand: int, expected: set[int]) -> None:
    machine = Machine(vcpus=3)
    machine.enable()
    machine.send(shorthand << 18 | 0x41)
    assert {i for i, apic in enumerate(machine.apics) if apic.pending()} == expected


def test_logical_destinations() -> None:
    machine = Machine(vcpus=3)
    machine.enable()
    for vcpu in range(3):
        machine.write(LDR, 1 << 24 + vcpu, vcpu)
    machine.send(0x841, destination=0b101)
    assert [apic.pending() for apic in machine.apics] == [True, False, True]
    for vcpu, apic in enumerate(machine.apics):
        apic.reset()
        machine.write(SVR, 0x1FF, vcpu)
        machine.write(DFR, 0x0FFFFFFF, vcpu)
        machine.write(LDR, (0x11, 0x12, 0x21)[vcpu] << 24, vcpu)
    machine.send(0x841, destination=0x13)
    assert [apic.pending() for apic in machine.apics] == [True, True, False]


def test_broadcast_and_lowest_priority(machine: Machine) -> None:
    machine.send(0x141, destination=0xFF)
    assert [apic.pending() for apic in machine.apics] == [True, False]


def test_higher_vectors_come_first_and_interrupt_others(machine: Machine) -> None:
    apic = machine.apics[0]
    for vector in (0x35, 0x52, 0x51):
        machine.send(1 << 18 | vector)
    assert apic.acknowledge() == 0x52
    assert not apic.pending()  # 0x51 is of the same class
    machine.send(1 << 18 | 0x60)
    assert apic.acknowledge() == 0x60
    machine.write(EOI, 0)
    assert not apic.pending()
    machine.write(EOI, 0)
    assert apic.acknowledge() == 0x51


def test_task_priority(machine: Machine) -> None:
    apic = machine.apics[0]
    machine.write(TPR, 0x40)
    machine.send(1 << 18 | 0x4F)
    assert not apic.pending()
    machine.calls(0)
    machine.write(TPR, 0x30)
    assert machine.calls(0) == ["interrupt"]
    assert apic.acknowledge() == 0x4F


def test_disabled_apic_takes_nothing() -> None:
    machine = Machine()
    machine.send(1 << 18 | 0x41)
    assert not machine.apics[0].pending()
    machine.write(LVT_TIMER, 0x41)
    assert machine.read(LVT_TIMER) & MASKED
    machine.enable()
    machine.write(LVT_TIMER, 0x41)
    assert machine.read(LVT_TIMER) == 0x41
    machine.write(SVR, 0xFF)
    assert machine.read(LVT_TIMER) & MASKED


def test_init_and_start_up(machine: Machine) -> None:
    machine.write(SVR, 0x1EF, 1)
    machine.calls(1)
    machine.send(0xC500, destination=1)  # INIT, assert
    assert machine.calls(1) == ["init"]
    assert machine.read(SVR, 1) == 0xFF
    assert machine.read(ID, 1) == 0x01000000
    machine.send(0x8500, destination=1)  # INIT, de-assert
    machine.send(0x4607, destination=1)
    assert machine.calls(1) == [("sipi", 7)]


def test_nmi_is_dropped(machine: Machine) -> None:
    machine.send(0x4400, destination=1)
    assert machine.calls(1) == []


def test_one_shot_timer(machine: Machine) -> None:
    loop = machine.platform.loop
    machine.write(LVT_TIMER, 0x41)
    machine.write(DIVIDE, DIVIDE_BY_16)
    machine.write(INITIAL_COUNT, 1000)
    loop.advance(8000)
    assert machine.read(CURRENT_COUNT) == 500
    loop.advance(16016)
    assert machine.apics[0].acknowledge() == 0x41
    assert machine.read(CURRENT_COUNT) == 0
    assert loop.armed() == []


def test_periodic_timer(machine: Machine) -> None:
    loop = machine.platform.loop
    machine.write(DIVIDE, DIVIDE_BY_1)
    machine.write(LVT_TIMER, PERIODIC | 0x41)
    machine.write(INITIAL_COUNT, 999_999)
    for n in range(1, 5):
        loop.advance(1_000_000 * n)
        assert machine.apics[0].acknowledge() == 0x41
        machine.write(EOI, 0)
        assert not machine.apics[0].pending()
    machine.write(INITIAL_COUNT, 0)
    assert loop.armed() == []


def test_masked_timer(machine: Machine) -> None:
    machine.write(LVT_TIMER, MASKED | PERIODIC | 0x41)
    machine.write(INITIAL_COUNT, 1000)
    assert machine.platform.loop.armed() == []
    machine.write(LVT_TIMER, PERIODIC | 0x41)
    assert len(machine.platform.loop.armed()) == 1
    machine.write(LVT_TIMER, MASKED | PERIODIC | 0x41)
    assert machine.platform.loop.armed() == []


def test_late_timer_gives_one_interrupt_and_keeps_its_phase(machine: Machine) -> None:
    machine.write(DIVIDE, DIVIDE_BY_1)
    machine.write(LVT_TIMER, PERIODIC | 0x41)
    machine.write(INITIAL_COUNT, 999_999)
    machine.platform.clock.time = 10_500_000
    machine.platform.loop.advance(10_500_000)
    assert machine.apics[0].acknowledge() == 0x41
    assert machine.platform.loop.armed() == [11_000_000]


def test_a_period_of_two_nanoseconds_gets_the_least_that_there_is(machine: Machine) -> None:
    loop = machine.platform.loop
    machine.write(DIVIDE, DIVIDE_BY_1)
    machine.write(LVT_TIMER, PERIODIC | 0x41)
    machine.write(INITIAL_COUNT, 1)
    count = 0
    machine.platform.clock.time = 50_000_000  # the host was busy
    while loop.armed()[0] <= 100_000_000:
        loop.advance(loop.armed()[0])
        count += 1
    assert count <= 100_000_000 // LEAST_PERIOD_NS


def test_timer_stops_with_the_vm(machine: Machine) -> None:
    machine.write(LVT_TIMER, 0x41)
    machine.write(INITIAL_COUNT, 1000)
    machine.platform.clock.enabled = False
    machine.apics[0].on_stop()
    assert machine.platform.loop.armed() == []
    machine.platform.clock.enabled = True
    machine.apics[0].on_run()
    assert len(machine.platform.loop.armed()) == 1


def test_pic_behind_lint0_without_set_up() -> None:
    """As a PC comes up: the first vCPU gets the PIC's interrupts though its APIC is disabled."""
    machine = Machine()
    machine.platform.outb(0x20, 0x11)
    machine.platform.outb(0x21, 0x08, 0x04, 0x01, 0x00)
    machine.pic.set_irq(1, True)
    assert [apic.pending() for apic in machine.apics] == [True, False]
    assert machine.calls(0) == ["interrupt"]
    assert machine.apics[0].acknowledge() == 0x09
    assert not machine.apics[0].pending()


def test_masked_lint0_keeps_the_pic_away(machine: Machine) -> None:
    machine.write(LVT_LINT0, MASKED | 0x700)
    machine.pic.set_irq(1, True)
    assert not machine.apics[0].pending()
    machine.write(LVT_LINT0, 0x700)
    assert machine.apics[0].pending()


def test_fixed_lint0(machine: Machine) -> None:
    machine.write(LVT_LINT0, 0x55)
    machine.pic.set_irq(1, True)
    assert machine.apics[0].acknowledge() == 0x55


def test_interrupts_of_the_apic_go_before_those_of_the_pic(machine: Machine) -> None:
    machine.platform.outb(0x20, 0x11)
    machine.platform.outb(0x21, 0x08, 0x04, 0x01, 0x00)
    machine.pic.set_irq(1, True)
    machine.send(1 << 18 | 0x41)
    assert machine.apics[0].acknowledge() == 0x41
    assert machine.apics[0].acknowledge() == 0x09
    assert machine.apics[0].acknowledge() == -1


def test_level_triggered_interrupt_of_the_io_apic(machine: Machine) -> None:
    platform = machine.platform
    for index, value in ((0x25, 1 << 24), (0x24, 0x8000 | 0x61)):
        platform.writel(0xFEC00000, index)
        platform.writel(0xFEC00010, value)
    machine.ioapic.set_irq(10, True)
    apic = machine.apics[1]
    assert apic.acknowledge() == 0x61
    assert machine.read(TMR + 0x30, 1) == 1 << 1
    machine.ioapic.set_irq(10, False)
    machine.ioapic.set_irq(10, True)
    assert not apic.pending()
    machine.write(EOI, 0, 1)
    assert apic.acknowledge() == 0x61
    machine.ioapic.set_irq(10, False)
    machine.write(EOI, 0, 1)
    assert not apic.pending()


def test_state_continues_in_a_new_machine(machine: Machine) -> None:
    machine.write(TPR, 0x20)
    machine.write(LVT_TIMER, PERIODIC | 0x41)
    machine.write(DIVIDE, DIVIDE_BY_1)
    machine.write(INITIAL_COUNT, 999)
    machine.send(1 << 18 | 0x61)
    machine.apics[0].acknowledge()
    machine.send(1 << 18 | 0x72)
    machine.pic.set_irq(3, True)
    machine.platform.loop.advance(500)
    machine.platform.clock.enabled = False
    for device in machine.devices:
        device.on_stop()
    states = [device.save() for device in machine.devices]
    assert states[0]["regs"][CURRENT_COUNT] | states[0]["regs"][CURRENT_COUNT + 1] << 8 == 499
    encoded = machine.apics[0].vmstate.encode(states[0])
    assert len(encoded) == 1024 + 24

    new = Machine()
    new.platform.clock.enabled = False
    new.platform.clock.time = 500
    for device, state in zip(new.devices, states, strict=True):
        device.restore(state)
    assert [device.save() for device in new.devices] == states
    new.platform.clock.enabled = True
    for device in new.devices:
        device.on_run()
    assert new.apics[0].acknowledge() == 0x72
    new.write(EOI, 0)
    new.write(EOI, 0)
    new.platform.loop.advance(1000)
    assert new.apics[0].acknowledge() == 0x41
    assert new.apics[0].acknowledge() == 3


def test_in_kernel() -> None:
    platform = SteppedPlatform(kernel_irqchip=True, vcpus=2)
    bus = ApicBus()
    apics = [LocalApic(index, bus) for index in range(2)]
    for apic in apics:
        apic.realize(platform)
        apic.reset()
    assert not platform.bus.memory.regions
    assert platform.accel.apics[1][ID : ID + 4] == bytes([0, 0, 0, 1])
    platform.accel.apics[1] = bytes(range(256)) * 4
    state = apics[1].save()
    assert state["regs"] == bytes(range(256)) * 4
    apics[0].restore(state)
    assert platform.accel.apics[0] == state["regs"]


def test_unrealize(machine: Machine) -> None:
    machine.write(LVT_TIMER, 0x41)
    machine.write(INITIAL_COUNT, 1000)
    for device in machine.devices:
        device.unrealize()
    assert not machine.platform.bus.memory.regions
    assert not machine.platform.bus.io.regions
    assert machine.platform.loop.armed() == []
