"""The I/O APIC: 24 inputs, redirected to local APICs (Intel 82093AA data sheet, 290566)."""

from __future__ import annotations

from cpr.devices.apic_bus import EXTINT
from cpr.devices.base import IrqchipDevice
from cpr.state.vmstate import VMStateDescription, u8, u32, u64, unused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.acpi.tables import Acpi
    from cpr.devices.apic_bus import ApicBus
    from cpr.devices.base import Platform

ADDRESS = 0xFEC00000
SIZE = 0x1000
PINS = 24
CHIP = "ioapic"

IOREGSEL, IOWIN, EOI = 0x00, 0x10, 0x40
INDEX_ID, INDEX_VERSION, INDEX_ARBITRATION, INDEX_REDIRECTION = 0x00, 0x01, 0x02, 0x10
VERSION = 0x20  # the first with the EOI register
ID_SHIFT = 24
ID_MASK = 0x0F

# A redirection entry.
VECTOR = 0xFF
DELIVERY_MODE_SHIFT, DELIVERY_MODE = 8, 7
DESTINATION_LOGICAL = 1 << 11
DELIVERY_STATUS = 1 << 12
REMOTE_IRR = 1 << 14
LEVEL_TRIGGERED = 1 << 15
MASKED = 1 << 16
DESTINATION_SHIFT = 56
READ_ONLY = DELIVERY_STATUS | REMOTE_IRR

TIMER_PIN = 2  # where a PC has ISA IRQ 0


class IOApic(IrqchipDevice):
    """Messages go to `apic_bus`, and those of mode ExtINT take their vector from its PIC."""

    idstr = "ioapic"
    vmstate = VMStateDescription(
        "ioapic",
        3,
        1,
        (u8("id"), u8("ioregsel"), unused(8), u32("irr"), u64("ioredtbl", PINS)),
    )

    def __init__(self, apic_bus: ApicBus) -> None:
        self._apic_bus = apic_bus
        self._platform: Platform | None = None
        self._clear()

    def _clear(self) -> None:
        self.id = 0
        self.ioregsel = 0
        self.irr = 0
        self.ioredtbl = [MASKED] * PINS

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        if not platform.accel.kernel_irqchip:
            self._apic_bus.eoi_handlers.append(self.end_of_interrupt)
            platform.register_mmio(ADDRESS, SIZE, self._read, self._write, CHIP)

    def unrealize(self) -> None:
        if self._platform is not None and not self._platform.accel.kernel_irqchip:
            self._apic_bus.eoi_handlers.remove(self.end_of_interrupt)
            self._platform.unregister_mmio(ADDRESS, SIZE)
        self._platform = None

    def describe(self, acpi: Acpi) -> None:
        acpi.add_io_apic(ADDRESS, self.id)
        acpi.add_override(0, TIMER_PIN)

    def reset(self) -> None:
        self._clear()
        if (accel := self.kernel) is not None:
            accel.set_irqchip(CHIP, self._fields())

    def save(self) -> dict:
        if (accel := self.kernel) is not None:
            return accel.get_irqchip(CHIP)
        return self._fields()

    def restore(self, state: dict) -> None:
        if (accel := self.kernel) is not None:
            accel.set_irqchip(CHIP, state)
            return
        self.id = state["id"]
        self.ioregsel = state["ioregsel"]
        self.irr = state["irr"]
        self.ioredtbl = list(state["ioredtbl"])

    def _fields(self) -> dict:
        return {
            "id": self.id,
            "ioregsel": self.ioregsel,
            "irr": self.irr,
            "ioredtbl": list(self.ioredtbl),
        }

    def set_irq(self, gsi: int, level: bool) -> None:
        """Sets global system interrupt `gsi`; it is pin `gsi`, but the ISA timer's is pin 2."""
        pin = TIMER_PIN if gsi == 0 else gsi
        if pin >= PINS:
            return
        entry = self.ioredtbl[pin]
        mask = 1 << pin
        if entry & LEVEL_TRIGGERED:
            self.irr = self.irr | mask if level else self.irr & ~mask
        elif level and not entry & MASKED:  # an edge at a masked pin is lost
            self.irr |= mask
        if level:
            self._service(pin)

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC has ended a level-triggered interrupt of `vector`."""
        for pin, entry in enumerate(self.ioredtbl):
            if entry & VECTOR == vector and entry & LEVEL_TRIGGERED and entry & REMOTE_IRR:
                self.ioredtbl[pin] &= ~REMOTE_IRR
                self._service(pin)

    def _service(self, pin: int) -> None:
        """Sends the message of a pin that requests one."""
        entry = self.ioredtbl[pin]
        mask = 1 << pin
        if not self.irr & mask or entry & MASKED:
            return
        if entry & LEVEL_TRIGGERED:
            if entry & REMOTE_IRR:
                return
            self.ioredtbl[pin] |= REMOTE_IRR
        else:
            self.irr &= ~mask
        mode = entry >> DELIVERY_MODE_SHIFT & DELIVERY_MODE
        vector = entry & VECTOR
        if mode == EXTINT:
            vector = self._apic_bus.acknowledge_pic()
        self._apic_bus.deliver(
            entry >> DESTINATION_SHIFT,
            bool(entry & DESTINATION_LOGICAL),
            mode,
            vector,
            bool(entry & LEVEL_TRIGGERED),
        )

    def _read(self, offset: int, size: int) -> int:
        if offset == IOREGSEL:
            return self.ioregsel
        if offset != IOWIN or size != 4:
            return 0
        index = self.ioregsel
        if index in (INDEX_ID, INDEX_ARBITRATION):
            return self.id << ID_SHIFT
        if index == INDEX_VERSION:
            return VERSION | PINS - 1 << 16
        pin, is_high = divmod(index - INDEX_REDIRECTION, 2)
        if 0 <= pin < PINS:
            return self.ioredtbl[pin] >> (32 if is_high else 0) & 0xFFFFFFFF
        return 0

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset == IOREGSEL:
            self.ioregsel = value & 0xFF
        elif offset == IOWIN and size == 4:
            self._write_register(self.ioregsel, value)
        elif offset == EOI and size == 4:
            self.end_of_interrupt(value & VECTOR)

    def _write_register(self, index: int, value: int) -> None:
        pin, is_high = divmod(index - INDEX_REDIRECTION, 2)
        if index == INDEX_ID:
            self.id = value >> ID_SHIFT & ID_MASK
        elif 0 <= pin < PINS:
            old = self.ioredtbl[pin]
            if is_high:
                entry = old & 0xFFFFFFFF | value << 32
            else:
                entry = old >> 32 << 32 | value & ~READ_ONLY | old & READ_ONLY
            if not entry & LEVEL_TRIGGERED:
                entry &= ~REMOTE_IRR
            self.ioredtbl[pin] = entry
            self._service(pin)
