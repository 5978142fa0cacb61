"""The local APIC of a vCPU (Intel SDM vol. 3, chapter 11).

With an in-kernel irqchip the devices only carry the kernel's registers; else they are emulated
here, xAPIC mode only, with a bus clock of 1 GHz.
"""

from __future__ import annotations

from cpr.devices.apic_bus import EXTINT, FIXED, INIT, ApicBus
from cpr.devices.base import IrqchipDevice, check_time
from cpr.devices.virtual_timer import LEAST_PERIOD_NS, VirtualTimer
from cpr.state.vmstate import VMStateDescription, buffer, i64, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.acpi.tables import Acpi
    from cpr.devices.base import Platform

ADDRESS = 0xFEE00000
SIZE = 0x1000
REGISTERS_SIZE = 0x400
STRIDE = 0x10

# Register offsets (table 11-1).
ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 0x20, 0x30, *range(0x80, 0x100, 0x10)
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x350, 0x360, 0x370
INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x380, 0x390, 0x3E0
LVTS = range(LVT_TIMER, LVT_ERROR + STRIDE, STRIDE)

VERSION_VALUE = 0x50014  # an integrated APIC with six LVT entries
SVR_ENABLE, SVR_NO_EOI_BROADCAST = 1 << 8, 1 << 12
DFR_FLAT = 0xF
LVT_MASKED, LVT_PERIODIC = 1 << 16, 1 << 17
LVT_WRITABLE = 0x000317FF
VECTOR = 0xFF

MODE_SHIFT, MODE = 8, 7  # the delivery mode, in the ICR and in LVT entries
ICR_LOGICAL, ICR_ASSERT, ICR_LEVEL = 1 << 11, 1 << 14, 1 << 15
ICR_BUSY = 1 << 12
SHORTHAND_SHIFT = 18
NO_SHORTHAND, TO_SELF, TO_ALL, TO_OTHERS = range(4)
BROADCAST = 0xFF

APIC_BASE_BSP, APIC_BASE_ENABLE = 1 << 8, 1 << 11
NEVER = -1


class LocalApic(IrqchipDevice):
    """The local APIC of vCPU `index`; its InterruptSource, and that of the PIC behind it.

    The first one registers the memory that all of them share: which one answers is a matter of
    which vCPU asks.
    """

    idstr = "apic"
    of_vcpu = True
    vmstate = VMStateDescription(
        "apic",
        3,
        3,
        (
            buffer("regs", REGISTERS_SIZE),
            u64("apicbase"),
            i64("initial_count_load_time"),
            i64("next_time"),
        ),
    )

    def __init__(self, index: int, bus: ApicBus) -> None:
        self.instance_id = index
        self._index = index
        self._bus = bus
        self._platform: Platform | None = None
        self._timer: VirtualTimer | None = None
        self._load_time = 0
        self._lint0 = False
        self._wants_interrupt = False
        self._clear()
        bus.apics.append(self)

    def _clear(self) -> None:
        """The registers after a reset."""
        self.apicbase = ADDRESS | APIC_BASE_ENABLE | (0 if self._index else APIC_BASE_BSP)
        self.irr = self.isr = self.tmr = 0  # of 256 bits
        self._registers = {
            ID: self._index << 24,
            TPR: 0,
            LDR: 0,
            DFR: 0xFFFFFFFF,
            SVR: 0xFF,
            ESR: 0,
            ICR_LOW: 0,
            ICR_HIGH: 0,
            INITIAL_COUNT: 0,
            DIVIDE: 0,
        }
        self._registers.update((offset, LVT_MASKED) for offset in LVTS)
        if self._index == 0:
            self._registers[LVT_LINT0] = EXTINT << MODE_SHIFT

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        if not platform.accel.kernel_irqchip:
            self._timer = VirtualTimer(platform, self._on_timer)
            if self._index == 0:
                platform.register_mmio(ADDRESS, SIZE, self._read_mmio, self._write_mmio, "apic-msi")

    def unrealize(self) -> None:
        if self._timer is not None and self._platform is not None:
            self._timer.set(None)
            if self._index == 0:
                self._platform.unregister_mmio(ADDRESS, SIZE)
        self._timer = None
        self._platform = None

    def describe(self, acpi: Acpi) -> None:
        acpi.add_local_apic(ADDRESS, self._index)
        if self._index == 0:
            acpi.add_nmi(1)

    def reset(self) -> None:
        self._clear()
        if self._timer is not None:
            self._timer.set(None)
            self._update()
        elif self._platform is not None:
            self._platform.accel.set_apic(self._vcpu, self._page())

    def save(self) -> dict:
        if (accel := self.kernel) is not None:
            registers = accel.get_apic(self._vcpu)
        else:
            registers = self._page()
        deadline = self._timer.deadline if self._timer is not None else None
        return {
            "regs": registers,
            "apicbase": self.apicbase,
            "initial_count_load_time": self._load_time,
            "next_time": NEVER if deadline is None else deadline,
        }

    def check(self, state: dict) -> None:
        check_time("initial_count_load_time", state["initial_count_load_time"])
        check_time("next_time", state["next_time"])

    def restore(self, state: dict) -> None:
        self.apicbase = state["apicbase"]
        if self._timer is None:
            assert self._platform is not None
            self._platform.accel.set_apic(self._vcpu, state["regs"])
            return
        self._load_page(state["regs"])
        self._load_time = state["initial_count_load_time"]
        self._timer.set(None if state["next_time"] == NEVER else state["next_time"])
        self._lint0 = self._bus.pic is not None and self._bus.pic.pending()
        self._update()

    def on_run(self) -> None:
        if self._timer is not None:
            self._timer.start()

    def on_stop(self) -> None:
        if self._timer is not None:
            self._timer.stop()

    @property
    def _vcpu(self) -> Any:
        assert self._platform is not None
        return self._platform.vcpus[self._index]

    def _page(self) -> bytes:
        """The registers in the layout of the xAPIC page."""
        page = bytearray(REGISTERS_SIZE)
        for offset, value in self._registers.items():
            page[offset : offset + 4] = value.to_bytes(4, "little")
        for offset, bits in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            for word in range(8):
                place = offset + STRIDE * word
                page[place : place + 4] = (bits >> 32 * word & 0xFFFFFFFF).to_bytes(4, "little")
        for offset in (VERSION, PPR, CURRENT_COUNT):
            page[offset : offset + 4] = self._read(offset).to_bytes(4, "little")
        return bytes(page)

    def _load_page(self, page: bytes) -> None:
        def word(offset: int) -> int:
            return int.from_bytes(page[offset : offset + 4], "little")

        for offset in self._registers:
            self._registers[offset] = word(offset)
        self.isr, self.tmr, self.irr = (
            sum(word(offset + STRIDE * i) << 32 * i for i in range(8)) for offset in (ISR, TMR, IRR)
        )

    # The InterruptSource.

    def pending(self) -> bool:
        return self._wants_interrupt

    def acknowledge(self) -> int:
        assert self._platform is not None
        with self._platform.lock:
            vector = self._deliverable()
            if vector >= 0:
                self.irr &= ~(1 << vector)
                self.isr |= 1 << vector
            elif self._accepts_pic() and self._bus.pic is not None and self._bus.pic.pending():
                vector = self._bus.acknowledge_pic()
            self._update()
            return vector

    def _update(self) -> None:
        """Finds out whether there is an interrupt for the vCPU, and tells it."""
        self._wants_interrupt = self._deliverable() >= 0 or (self._lint0 and self._accepts_pic())
        if self._wants_interrupt and self._platform is not None:
            self._vcpu.interrupt()

    def _is_enabled(self) -> bool:
        return bool(self._registers[SVR] & SVR_ENABLE)

    def _processor_priority(self) -> int:
        task = self._registers[TPR]
        service = max(self.isr.bit_length() - 1, 0)
        return task if task >> 4 >= service >> 4 else service & 0xF0

    def _deliverable(self) -> int:
        """The requested vector that is above the processor's priority, or -1."""
        vector = self.irr.bit_length() - 1
        if not self._is_enabled() or vector >> 4 <= self._processor_priority() >> 4:
            return -1
        return vector

    def _accepts_pic(self) -> bool:
        lvt = self._registers[LVT_LINT0]
        return not lvt & LVT_MASKED and lvt >> MODE_SHIFT & MODE == EXTINT

    # What arrives.

    def is_addressed(self, destination: int, is_logical: bool) -> bool:
        """Whether a message to `destination` is for this APIC (11.6.2)."""
        if destination == BROADCAST:
            return True
        if not is_logical:
            return destination == self._registers[ID] >> 24
        own = self._registers[LDR] >> 24
        if self._registers[DFR] >> 28 == DFR_FLAT:
            return bool(own & destination)
        return own >> 4 == destination >> 4 and bool(own & destination & 0xF)

    def request(self, vector: int, is_level: bool) -> None:
        """Accepts a fixed interrupt."""
        if not self._is_enabled():
            return
        mask = 1 << vector
        self.irr |= mask
        self.tmr = self.tmr | mask if is_level else self.tmr & ~mask
        self._update()

    def set_lint0(self, level: bool) -> None:
        rises = level and not self._lint0
        self._lint0 = level
        lvt = self._registers[LVT_LINT0]
        if rises and not lvt & LVT_MASKED and lvt >> MODE_SHIFT & MODE == FIXED:
            self.request(lvt & VECTOR, False)
        self._update()

    def init(self) -> None:
        """INIT: registers as after a reset, but the ID stays; the vCPU waits for SIPI."""
        identity = self._registers[ID]
        self._clear()
        self._registers[ID] = identity
        if self._timer is not None:
            self._timer.set(None)
        self._vcpu.init()
        self._update()

    def start_up(self, vector: int) -> None:
        self._vcpu.sipi(vector)

    # The timer.

    def _shift(self) -> int:
        """log2 of the divisor of the bus clock (figure 11-10)."""
        divide = self._registers[DIVIDE]
        return ((divide & 3 | divide >> 1 & 4) + 1) & 7

    def _current_count(self) -> int:
        count = self._registers[INITIAL_COUNT]
        if not count or self._platform is None:
            return 0
        ticks = self._platform.clock.now() - self._load_time >> self._shift()
        if self._registers[LVT_TIMER] & LVT_PERIODIC:
            return count - ticks % (count + 1)
        return max(count - ticks, 0)

    def _set_timer(self, now: int) -> None:
        """Arms the timer for the first time after `now` at which the counter has run out.

        That is one tick after zero, as QEMU counts.
        """
        assert self._timer is not None
        count = self._registers[INITIAL_COUNT]
        lvt = self._registers[LVT_TIMER]
        ticks = now - self._load_time >> self._shift()
        period = count + 1
        expires = ticks - ticks % period + period if lvt & LVT_PERIODIC else period
        if count and not lvt & LVT_MASKED and expires > ticks:
            self._timer.set(self._load_time + (expires << self._shift()))
        else:
            self._timer.set(None)

    def _on_timer(self, deadline: int) -> None:
        assert self._timer is not None and self._platform is not None
        lvt = self._registers[LVT_TIMER]
        if not lvt & LVT_MASKED:
            self.request(lvt & VECTOR, False)
        now = self._timer.late(deadline)
        if self._registers[INITIAL_COUNT] + 1 << self._shift() < LEAST_PERIOD_NS:
            now = self._platform.clock.now() + LEAST_PERIOD_NS
        self._set_timer(now)

    # Accesses by the guest.

    def _read_mmio(self, offset: int, size: int) -> int:
        assert self._platform is not None
        index = self._platform.current_vcpu()
        if index < 0 or size != 4 or offset % STRIDE:
            return 0
        return self._bus.apics[index]._read(offset)

    def _write_mmio(self, offset: int, size: int, value: int) -> None:
        assert self._platform is not None
        index = self._platform.current_vcpu()
        if index >= 0 and size == 4 and offset % STRIDE == 0:
            self._bus.apics[index]._write(offset, value)

    def _read(self, offset: int) -> int:
        if offset in self._registers:
            return self._registers[offset]
        if offset == VERSION:
            return VERSION_VALUE
        if offset == PPR:
            return self._processor_priority()
        if offset == CURRENT_COUNT:
            return self._current_count()
        for first, bits in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            if first <= offset < first + 8 * STRIDE:
                return bits >> 2 * (offset - first) & 0xFFFFFFFF
        return 0

    def _write(self, offset: int, value: int) -> None:
        if offset == EOI:
            self._end_of_interrupt()
        elif offset == ICR_LOW:
            self._registers[ICR_LOW] = value & ~ICR_BUSY
            self._send(value)
        elif offset == INITIAL_COUNT:
            self._registers[INITIAL_COUNT] = value
            self._restart_timer()
        elif offset in LVTS:
            self._write_lvt(offset, value)
        elif offset == ESR:
            self._registers[ESR] = 0
        elif offset in self._registers:
            self._write_register(offset, value)
        self._update()

    def _write_register(self, offset: int, value: int) -> None:
        if offset == SVR:
            value &= SVR_ENABLE | SVR_NO_EOI_BROADCAST | VECTOR
            if not value & SVR_ENABLE:
                for lvt in LVTS:
                    self._registers[lvt] |= LVT_MASKED
        elif offset == TPR:
            value &= 0xFF
        elif offset in (ID, LDR, ICR_HIGH):
            value &= 0xFF000000
        elif offset == DFR:
            value |= 0x0FFFFFFF
        elif offset == DIVIDE:
            value &= 0xB
        self._registers[offset] = value
        if offset == DIVIDE:
            self._restart_timer()

    def _write_lvt(self, offset: int, value: int) -> None:
        value &= LVT_WRITABLE
        if not self._is_enabled():
            value |= LVT_MASKED
        self._registers[offset] = value
        if offset == LVT_TIMER and self._platform is not None:
            self._set_timer(self._platform.clock.now())

    def _restart_timer(self) -> None:
        assert self._platform is not None
        self._load_time = self._platform.clock.now()
        self._set_timer(self._load_time)

    def _end_of_interrupt(self) -> None:
        vector = self.isr.bit_length() - 1
        if vector < 0:
            return
        self.isr &= ~(1 << vector)
        if self.tmr >> vector & 1 and not self._registers[SVR] & SVR_NO_EOI_BROADCAST:
            self._bus.end_of_interrupt(vector)

    def _send(self, command: int) -> None:
        """Sends what the ICR says."""
        mode = command >> MODE_SHIFT & MODE
        if mode == INIT and command & ICR_LEVEL and not command & ICR_ASSERT:
            return  # the end of INIT, which no APIC since the 82489DX knows
        shorthand = command >> SHORTHAND_SHIFT & 3
        if shorthand == NO_SHORTHAND:
            destination = self._registers[ICR_HIGH] >> 24
            apics = self._bus.addressed(destination, bool(command & ICR_LOGICAL))
        else:
            apics = {
                TO_SELF: [self],
                TO_ALL: list(self._bus.apics),
                TO_OTHERS: [apic for apic in self._bus.apics if apic is not self],
            }[shorthand]
        for apic in apics:
            if apic is not self:
                apic._vcpu.forget_code()
        self._bus.send(apics, mode, command & VECTOR, False)
