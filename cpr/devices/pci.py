"""The PCI host: configuration mechanism #1, ECAM, a host bridge at 00:00.0, and INTx wiring.

    0x0cf8      configuration address: bit 31 enable, bus, device, function, register
    0x0cfc      configuration data, 4 bytes
    0xe0000000  ECAM, 256 MiB: 4 KiB for every function of every bus (PCI Express base spec. 7.2.2)

There is one bus.  The host bridge has the ids and the PCIEXBAR register (60h) of Q35's, so that a
guest finds ECAM in the usual way; there is no firmware that would move it, and so it does not move.
RAM of this machine never reaches it.  Base addresses are the guest's to give: it learns from ACPI
where there is room, which is around ECAM below 4 GiB, and above all RAM.  INTx is wired as on the
PIIX: pin and slot make one of four PIRQs, and these are where a PC's firmware puts them, on IRQ 10,
10, 11 and 11.
"""

from __future__ import annotations

from cpr.devices.base import Device
from cpr.errors import ConfigError
from cpr.state.vmstate import VMStateDescription, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.acpi.tables import Acpi
    from cpr.devices.base import Platform

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC
ECAM_BASE = 0xE0000000
ECAM_SIZE = 256 << 20
FUNCTION_SIZE = 4096
SLOTS = 32
PIRQ_IRQS = (10, 10, 11, 11)

BUSES = ECAM_SIZE >> 20
IOAPIC_ADDRESS = 0xFEC00000  # from here on addresses below 4 GiB are the board's
FIRST_GIB = 256  # of the addresses above RAM, and how many there are: both fit into 39 bits
ALL_FUNCTIONS = 0xFFFF

BRIDGE_IDS = 0x29C08086  # device and vendor
BRIDGE_CLASS = 0x06000000  # host bridge, revision 0
PCIEXBAR = 0x60
PCIEXBAR_ENABLE = 1  # and 256 buses


class PciFunction:
    """One function of a device in `slot`; single-function devices have no other.

    Offsets are below `FUNCTION_SIZE`, sizes 1, 2 or 4 bytes; an access never crosses 4 bytes.
    """

    slot = 0

    def config_read(self, offset: int, size: int) -> int:
        raise NotImplementedError

    def config_write(self, offset: int, size: int, value: int) -> None:
        raise NotImplementedError


class HostBridge(PciFunction):
    """00:00.0: read-only."""

    def __init__(self) -> None:
        registers = {0x00: BRIDGE_IDS, 0x08: BRIDGE_CLASS, PCIEXBAR: ECAM_BASE | PCIEXBAR_ENABLE}
        self._config = bytearray(FUNCTION_SIZE)
        for offset, value in registers.items():
            self._config[offset : offset + 4] = value.to_bytes(4, "little")

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        pass


class PciHost(Device):
    """The bus; its functions are added by the devices that have them."""

    idstr = "PCIHost"
    vmstate = VMStateDescription("PCIHost", 1, 1, (u32("config_reg"),))

    def __init__(self) -> None:
        self._platform: Platform | None = None
        self._config_reg = 0
        self._functions: dict[int, PciFunction] = {0: HostBridge()}
        self._raised: dict[int, set[int]] = {}  # the slots that hold a line up, if it is known

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        platform.register_io(
            CONFIG_ADDRESS, 4, self._read_address, self._write_address, "pci-conf-idx", 4
        )
        platform.register_io(CONFIG_DATA, 4, self._read_data, self._write_data, "pci-conf-data", 4)
        platform.register_mmio(
            ECAM_BASE, ECAM_SIZE, self._read_ecam, self._write_ecam, "pcie-mmcfg-mmio"
        )

    def unrealize(self) -> None:
        if self._platform is not None:
            self._platform.unregister_io(CONFIG_ADDRESS, 4)
            self._platform.unregister_io(CONFIG_DATA, 4)
            self._platform.unregister_mmio(ECAM_BASE, ECAM_SIZE)
            self._platform = None

    def add(self, function: PciFunction, slot: int | None = None) -> None:
        """Puts `function` into `slot`, or the first that is free.  Raises ConfigError."""
        if slot is None:
            free = [number for number in range(SLOTS) if number not in self._functions]
            if not free:
                raise ConfigError("PCI: no slot/function available, all in use or reserved")
            slot = free[0]
        elif slot in self._functions:
            raise ConfigError(f"PCI: slot {slot} function 0 not available, in use")
        function.slot = slot
        self._functions[slot] = function

    def remove(self, function: PciFunction) -> None:
        """The inverse of `add`; nothing happens where that has not been."""
        if self._functions.get(function.slot) is function:
            del self._functions[function.slot]

    def irq_of(self, slot: int, pin: int) -> int:
        """The GSI of INTA…INTD (1…4) of the device in `slot`."""
        return PIRQ_IRQS[(slot - 1 + pin - 1) % len(PIRQ_IRQS)]

    def set_intx(self, slot: int, pin: int, level: bool) -> None:
        """Sets INTA…INTD (1…4) of the device in `slot`; a line is up while any of its devices has
        it so.
        """
        irq = self.irq_of(slot, pin)
        is_known = irq in self._raised
        raised = self._raised.setdefault(irq, set())
        before = bool(raised)
        (raised.add if level else raised.discard)(slot)
        if (not is_known or bool(raised) != before) and self._platform is not None:
            self._platform.set_irq(irq, bool(raised))

    def describe(self, acpi: Acpi) -> None:
        from cpr.acpi import aml
        from cpr.acpi.tables import HIGH_LEVEL

        mcfg = bytes(8) + ECAM_BASE.to_bytes(8, "little") + bytes((0, 0, 0, BUSES - 1)) + bytes(4)
        acpi.add_table(b"MCFG", 1, mcfg)
        for irq in sorted(set(PIRQ_IRQS)):
            acpi.add_override(irq, irq, HIGH_LEVEL)
        routes = [
            aml.package(
                aml.integer(slot << 16 | ALL_FUNCTIONS),
                aml.integer(pin - 1),
                aml.integer(0),
                aml.integer(self.irq_of(slot, pin)),
            )
            for slot in range(1, SLOTS)
            for pin in range(1, len(PIRQ_IRQS) + 1)
        ]
        bridge = aml.device(
            "PCI0",
            aml.name("_HID", aml.eisa_id("PNP0A08")),
            aml.name("_CID", aml.eisa_id("PNP0A03")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_CRS", aml.resources(*self._windows())),
            aml.name("_PRT", aml.package(*routes)),
        )
        taken = aml.resources(aml.fixed_memory(ECAM_BASE, ECAM_SIZE))
        board = (aml.name("_HID", aml.eisa_id("PNP0C02")), aml.name("_CRS", taken))
        acpi.add_device(bridge, aml.device("MBRD", *board))

    def _windows(self) -> list[bytes]:
        """What the bridge passes on: buses, ports, and addresses that are nobody else's."""
        from cpr.acpi import aml

        assert self._platform is not None
        ends = [section.start + section.size for section in self._platform.memory.sections]
        low = max(end for end in ends if end <= ECAM_BASE)
        high = max(FIRST_GIB << 30, *(-(-end >> 30) << 30 for end in ends))
        return [
            aml.bus_range(0, BUSES - 1),
            aml.io_ports(CONFIG_ADDRESS, 8),
            aml.io_range(0, CONFIG_ADDRESS - 1),
            aml.io_range(CONFIG_DATA + 4, 0xFFFF),
            *([aml.memory_range(low, ECAM_BASE - 1)] if low < ECAM_BASE else []),
            aml.memory_range(ECAM_BASE + ECAM_SIZE, IOAPIC_ADDRESS - 1),
            aml.memory_range(high, high + (FIRST_GIB << 30) - 1),
        ]

    def reset(self) -> None:
        self._config_reg = 0

    def save(self) -> dict:
        return {"config_reg": self._config_reg}

    def restore(self, state: dict) -> None:
        self._config_reg = state["config_reg"]
        self._raised = {}  # the interrupt chips have the lines as they were

    def _read_address(self, offset: int, size: int) -> int:
        return self._config_reg if size == 4 else (1 << 8 * size) - 1

    def _write_address(self, offset: int, size: int, value: int) -> None:
        if size == 4:  # shorter ones are not for the host bridge
            self._config_reg = value & 0x80FFFFFC | value & 3

    def _read_data(self, offset: int, size: int) -> int:
        if not self._config_reg >> 31:
            return (1 << 8 * size) - 1
        return self._read(self._config_reg >> 8 & 0xFFFF, self._config_reg & 0xFC | offset, size)

    def _write_data(self, offset: int, size: int, value: int) -> None:
        if self._config_reg >> 31:
            place = self._config_reg & 0xFC | offset
            self._write(self._config_reg >> 8 & 0xFFFF, place, size, value)

    def _read_ecam(self, offset: int, size: int) -> int:
        return self._read(offset // FUNCTION_SIZE, offset % FUNCTION_SIZE, size)

    def _write_ecam(self, offset: int, size: int, value: int) -> None:
        self._write(offset // FUNCTION_SIZE, offset % FUNCTION_SIZE, size, value)

    def _find(self, bdf: int) -> PciFunction | None:
        """The function of bus, device and function number; only function 0 of bus 0 is there."""
        bus, slot, function = bdf >> 8, bdf >> 3 & 0x1F, bdf & 7
        return None if bus or function else self._functions.get(slot)

    def _read(self, bdf: int, offset: int, size: int) -> int:
        function = self._find(bdf)
        return (1 << 8 * size) - 1 if function is None else function.config_read(offset, size)

    def _write(self, bdf: int, offset: int, size: int, value: int) -> None:
        function = self._find(bdf)
        if function is not None:
            function.config_write(offset, size, value)


def parse_slot(text: str) -> int:
    """-device addr=SLOT[.FUNCTION], both hexadecimal.  Raises ConfigError."""
    slot, _, function = text.partition(".")
    try:
        number, which = int(slot, 16), int(function or "0", 16)
    except ValueError:
        raise ConfigError(f"Property 'addr' doesn't take value '{text}'") from None
    if not 0 < number < SLOTS or which:
        raise ConfigError(
            f"Property 'addr' doesn't take value '{text}': give slot 1 to 1f, function 0"
        )
    return number
