"""The two 8259A interrupt controllers of a PC (Intel 8259A data sheet, 231468).

The master has IRQ 0 to 7 at ports 0x20 and 0x21, the slave IRQ 8 to 15 at 0xa0 and 0xa1; the slave
is on the master's input 2.  The edge/level registers are at 0x4d0 and 0x4d1.
"""

from __future__ import annotations

from cpr.accel.irqchip import PIC_ELCR_MASKS, PIC_FIELDS
from cpr.devices.base import IrqchipDevice
from cpr.state.vmstate import VMStateDescription, u8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.devices.base import Platform

PORTS = (0x20, 0xA0)
ELCR_PORTS = (0x4D0, 0x4D1)
CASCADE = 2
SPURIOUS = 7

ICW1 = 0x10
ICW1_SINGLE, ICW1_NEEDS_ICW4 = 0x02, 0x01
ICW4_AUTO_EOI, ICW4_SPECIAL_FULLY_NESTED = 0x02, 0x10
OCW3 = 0x08
OCW3_POLL, OCW3_READ, OCW3_READ_ISR = 0x04, 0x02, 0x01
OCW3_SET_SPECIAL_MASK, OCW3_SPECIAL_MASK = 0x40, 0x20
# The three upper bits of OCW2.
OCW2_EOI, OCW2_SPECIFIC, OCW2_ROTATE = 1, 2, 4

# What the data port expects, as `init_state` counts.
READY, NEEDS_ICW2, NEEDS_ICW3, NEEDS_ICW4 = range(4)


class I8259(IrqchipDevice):
    """One controller: the master (`number` 0) or the slave (1).

    `on_output(level)` is called when the INT output changes.
    """

    idstr = "i8259"
    vmstate = VMStateDescription("i8259", 1, 1, tuple(u8(name) for name in PIC_FIELDS))

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    single_mode: int

    def __init__(self, number: int) -> None:
        self.instance_id = number
        self.output = False
        self.on_output: Callable[[bool], None] = lambda level: None
        self.elcr = 0
        self.irr = 0
        self._number = number
        self._platform: Platform | None = None
        self._initialize()

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        if not platform.accel.kernel_irqchip:
            name = ("pic-master", "pic-slave")[self._number]
            platform.register_io(PORTS[self._number], 2, self._read, self._write, name)
            elcr = ELCR_PORTS[self._number]
            platform.register_io(elcr, 1, self._read_elcr, self._write_elcr, f"{name}-elcr")

    def unrealize(self) -> None:
        if self._platform is not None and not self._platform.accel.kernel_irqchip:
            self._platform.unregister_io(PORTS[self._number], 2)
            self._platform.unregister_io(ELCR_PORTS[self._number], 1)
        self._platform = None

    def reset(self) -> None:
        self.elcr = 0
        self._initialize()
        if (accel := self.kernel) is not None:
            accel.set_irqchip(self._chip, self._fields())

    def save(self) -> dict:
        if (accel := self.kernel) is not None:
            return accel.get_irqchip(self._chip)
        return self._fields()

    def restore(self, state: dict) -> None:
        if (accel := self.kernel) is not None:
            accel.set_irqchip(self._chip, state)
            return
        for name in PIC_FIELDS:
            setattr(self, name, state[name])
        self._update()

    @property
    def _chip(self) -> str:
        return f"i8259-{self._number}"

    def _fields(self) -> dict:
        return {name: getattr(self, name) for name in PIC_FIELDS}

    def _initialize(self) -> None:
        """What ICW1 does: only the edge/level register and level-triggered requests stay."""
        for name in PIC_FIELDS:
            if name not in ("irr", "elcr"):
                setattr(self, name, 0)
        self.irr &= self.elcr
        self._update()

    def set_input(self, number: int, level: bool) -> None:
        """Sets input `number` (0..7)."""
        mask = 1 << number
        if level:
            if self.elcr & mask or not self.last_irr & mask:
                self.irr |= mask
            self.last_irr |= mask
        else:
            if self.elcr & mask:
                self.irr &= ~mask
            self.last_irr &= ~mask
        self._update()

    def requested(self) -> int:
        """The input whose interrupt is to be delivered, or -1."""
        wanted = self._priority(self.irr & ~self.imr)
        if wanted is None:
            return -1
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if self.special_fully_nested_mode and self._number == 0:
            in_service &= ~(1 << CASCADE)
        current = self._priority(in_service)
        if current is not None and wanted >= current:
            return -1
        return self._input_of(wanted)

    def acknowledge(self, number: int) -> None:
        """Takes the interrupt of an input into service."""
        mask = 1 << number
        if not self.auto_eoi:
            self.isr |= mask
        elif self.rotate_on_auto_eoi:
            self.priority_add = (number + 1) & 7
        if not self.elcr & mask:
            self.irr &= ~mask
        self._update()

    def _priority(self, inputs: int) -> int | None:
        """The best priority (0 is the highest) among a mask of inputs."""
        for priority in range(8):
            if inputs & 1 << self._input_of(priority):
                return priority
        return None

    def _input_of(self, priority: int) -> int:
        return (priority + self.priority_add) & 7

    def _update(self) -> None:
        output = self.requested() >= 0
        if output != self.output:
            self.output = output
            self.on_output(output)

    def _read(self, offset: int, size: int) -> int:
        if self.poll:
            self.poll = 0
            number = self.requested()
            if number < 0:
                return 0
            self.acknowledge(number)
            return number | 0x80
        if offset == 1:
            return self.imr
        return self.isr if self.read_reg_select else self.irr

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset == 1:
            self._write_data(value)
        elif value & ICW1:
            self._initialize()
            self.init_state = NEEDS_ICW2
            self.init4 = value & ICW1_NEEDS_ICW4
            self.single_mode = value & ICW1_SINGLE
        elif value & OCW3:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value >> 5, value & 7)

    def _write_ocw3(self, value: int) -> None:
        if value & OCW3_POLL:
            self.poll = 1
        if value & OCW3_READ:
            self.read_reg_select = value & OCW3_READ_ISR
        if value & OCW3_SET_SPECIAL_MASK:
            self.special_mask = int(bool(value & OCW3_SPECIAL_MASK))
            self._update()

    def _write_ocw2(self, command: int, number: int) -> None:
        if command & ~OCW2_ROTATE == 0:
            self.rotate_on_auto_eoi = int(bool(command))
            return
        if command & OCW2_EOI:
            if not command & OCW2_SPECIFIC:
                priority = self._priority(self.isr)
                if priority is None:
                    return
                number = self._input_of(priority)
            self.isr &= ~(1 << number)
        if command & OCW2_ROTATE:
            self.priority_add = (number + 1) & 7
        self._update()

    def _write_data(self, value: int) -> None:
        if self.init_state == READY:
            self.imr = value
            self._update()
        elif self.init_state == NEEDS_ICW2:
            self.irq_base = value & 0xF8
            self.init_state = NEEDS_ICW3 if not self.single_mode else self._after_icw3()
        elif self.init_state == NEEDS_ICW3:
            self.init_state = self._after_icw3()
        else:
            self.special_fully_nested_mode = int(bool(value & ICW4_SPECIAL_FULLY_NESTED))
            self.auto_eoi = int(bool(value & ICW4_AUTO_EOI))
            self.init_state = READY

    def _after_icw3(self) -> int:
        return NEEDS_ICW4 if self.init4 else READY

    def _read_elcr(self, offset: int, size: int) -> int:
        return self.elcr

    def _write_elcr(self, offset: int, size: int, value: int) -> None:
        self.elcr = value & PIC_ELCR_MASKS[self._number]


class I8259Pair:
    """Master and slave as they are wired in a PC; both are added to the machine as devices.

    `on_output(level)` is called when the master's INT output changes.  An InterruptSource, but
    its `acknowledge` is for callers that hold the lock.
    """

    def __init__(self) -> None:
        self.master = I8259(0)
        self.slave = I8259(1)
        self.on_output: Callable[[bool], None] = lambda level: None
        self.slave.on_output = lambda level: self.master.set_input(CASCADE, level)
        self.master.on_output = lambda level: self.on_output(level)

    def set_irq(self, gsi: int, level: bool) -> None:
        """Sets an ISA IRQ; other global system interrupts are not the controllers'."""
        if gsi < 8:
            self.master.set_input(gsi, level)
        elif gsi < 16:
            self.slave.set_input(gsi - 8, level)

    def pending(self) -> bool:
        return self.master.output

    def acknowledge(self) -> int:
        """The vector; that of input 7 where the interrupt has gone in the meantime."""
        number = self.master.requested()
        if number == CASCADE:
            vector = self._acknowledge_slave()
        else:
            vector = self.master.irq_base + (number if number >= 0 else SPURIOUS)
        if number >= 0:
            self.master.acknowledge(number)
        return vector

    def _acknowledge_slave(self) -> int:
        number = self.slave.requested()
        if number < 0:
            return self.slave.irq_base + SPURIOUS
        self.slave.acknowledge(number)
        return self.slave.irq_base + number
