"""The tables: RSDP, XSDT, FADT, FACS, MADT, DSDT and those that devices add (ACPI 6.5, chapter 5).

They lie at TABLES_ADDRESS in guest RAM, which a guest is told to leave alone.  Each device adds its
part to an `Acpi`; what no device adds, the guest does not find.
"""

from __future__ import annotations

from cpr.acpi import aml

TABLES_ADDRESS = 0x98000
TABLES_SIZE = 0x8000
RSDP_ADDRESS = TABLES_ADDRESS
FACS_ADDRESS = TABLES_ADDRESS + 0x40
FIRST_TABLE = TABLES_ADDRESS + 0x80

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"CPRVMM", b"CPRPC   ", b"CPR "
HEADER_SIZE = 36
RSDP_SIZE, RSDP_V1_SIZE = 36, 20
FACS_SIZE = 64
WAKING_VECTOR = 12  # in the FACS

# FADT: fields by name, (offset, size in bytes), table 5.9.
FADT_SIZE = 276
FADT_FIELDS = {
    "FIRMWARE_CTRL": (36, 4),
    "DSDT": (40, 4),
    "SCI_INT": (46, 2),
    "PM1a_EVT_BLK": (56, 4),
    "PM1a_CNT_BLK": (64, 4),
    "PM_TMR_BLK": (76, 4),
    "PM1_EVT_LEN": (88, 1),
    "PM1_CNT_LEN": (89, 1),
    "PM_TMR_LEN": (91, 1),
    "P_LVL2_LAT": (96, 2),
    "P_LVL3_LAT": (98, 2),
    "CENTURY": (108, 1),
    "IAPC_BOOT_ARCH": (109, 2),
    "Flags": (112, 4),
    "RESET_REG": (116, 12),
    "RESET_VALUE": (128, 1),
    "X_DSDT": (140, 8),
}
NO_C2, NO_C3 = 101, 1001  # µs, above what counts as having them

# Flags (table 5.10) and IAPC_BOOT_ARCH (table 5.11).
WBINVD, PROC_C1, SLP_BUTTON, FIX_RTC, RESET_REG_SUP = 1 << 0, 1 << 2, 1 << 5, 1 << 6, 1 << 10
LEGACY_DEVICES, NO_VGA, NO_CMOS_RTC = 1 << 0, 1 << 2, 1 << 5

# MADT (table 5.19 on).
PCAT_COMPAT = 1  # there are 8259s too
LOCAL_APIC, IO_APIC, SOURCE_OVERRIDE, LOCAL_NMI = 0, 1, 2, 4
ALL_PROCESSORS = 0xFF
CONFORMING, HIGH_LEVEL = 0x0, 0xD


class Acpi:
    """What is described so far.  Devices call its methods."""

    def __init__(self) -> None:
        self._fadt = {
            "P_LVL2_LAT": NO_C2,
            "P_LVL3_LAT": NO_C3,
            "IAPC_BOOT_ARCH": LEGACY_DEVICES | NO_VGA | NO_CMOS_RTC,
            "Flags": WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC,
        }
        self._madt: list[bytes] = []
        self._apic_address = 0
        self._root: list[bytes] = []
        self._system_bus: list[bytes] = []
        self._others: list[tuple[bytes, int, bytes]] = []

    def set_fadt(self, **fields: int) -> None:
        """Fields of the fixed table, by the names of FADT_FIELDS."""
        self._fadt |= fields

    def set_flags(self, flags: int) -> None:
        self._fadt["Flags"] |= flags

    def clear_boot_flags(self, flags: int) -> None:
        self._fadt["IAPC_BOOT_ARCH"] &= ~flags

    def set_reset_register(self, port: int, value: int) -> None:
        """A write of `value` to `port` resets the machine."""
        self._fadt["RESET_REG"] = int.from_bytes(_io_address(port, 1), "little")
        self._fadt["RESET_VALUE"] = value
        self.set_flags(RESET_REG_SUP)

    def add_local_apic(self, address: int, identifier: int) -> None:
        self._apic_address = address
        self._madt.append(bytes((LOCAL_APIC, 8, identifier, identifier)) + _u32(1))

    def add_nmi(self, lint: int) -> None:
        """Input `lint` of every local APIC is the NMI."""
        self._madt.append(bytes((LOCAL_NMI, 6, ALL_PROCESSORS, 0, 0, lint)))

    def add_io_apic(self, address: int, identifier: int) -> None:
        self._madt.append(bytes((IO_APIC, 12, identifier, 0)) + _u32(address) + _u32(0))

    def add_override(self, irq: int, gsi: int, flags: int = CONFORMING) -> None:
        """ISA interrupt `irq` is elsewhere than at `gsi` == irq, or not edge-triggered."""
        self._madt.append(
            bytes((SOURCE_OVERRIDE, 10, 0, irq)) + _u32(gsi) + flags.to_bytes(2, "little")
        )

    def add_device(self, *objects: bytes) -> None:
        r"""Adds objects of the DSDT under \_SB."""
        self._system_bus += objects

    def add_object(self, *objects: bytes) -> None:
        """Adds objects of the DSDT at its root."""
        self._root += objects

    def add_table(self, signature: bytes, revision: int, body: bytes) -> None:
        self._others.append((signature, revision, body))

    def build(self) -> bytes:
        """What lies at TABLES_ADDRESS.  Raises ValueError where it does not fit there."""
        image = bytearray(FIRST_TABLE - TABLES_ADDRESS)

        def place(signature: bytes, revision: int, body: bytes) -> int:
            image.extend(bytes(-len(image) % 16))
            address = TABLES_ADDRESS + len(image)
            image.extend(_table(signature, revision, body))
            return address

        dsdt = place(b"DSDT", 2, b"".join([*self._root, aml.scope("\\_SB", *self._system_bus)]))
        fadt = self._fadt | {"FIRMWARE_CTRL": FACS_ADDRESS, "DSDT": dsdt, "X_DSDT": dsdt}
        tables = [place(b"FACP", 6, _fadt(fadt))]
        madt = _u32(self._apic_address) + _u32(PCAT_COMPAT) + b"".join(self._madt)
        tables.append(place(b"APIC", 4, madt))
        tables += [place(*other) for other in self._others]
        xsdt = place(b"XSDT", 1, b"".join(table.to_bytes(8, "little") for table in tables))
        image[:RSDP_SIZE] = _rsdp(xsdt)
        facs = FACS_ADDRESS - TABLES_ADDRESS
        image[facs : facs + 8] = b"FACS" + _u32(FACS_SIZE)
        image[facs + 32] = 1  # version
        if len(image) > TABLES_SIZE:
            raise ValueError(f"the ACPI tables have {len(image)} bytes, more than {TABLES_SIZE}")
        return bytes(image)


def waking_vector(memory_at_facs: bytes) -> int:
    """Where a guest that slept wants to go on, by the FACS_SIZE bytes at FACS_ADDRESS; else 0."""
    if memory_at_facs[:8] != b"FACS" + _u32(FACS_SIZE):
        return 0
    return int.from_bytes(memory_at_facs[WAKING_VECTOR : WAKING_VECTOR + 4], "little")


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _io_address(port: int, size: int) -> bytes:
    """A Generic Address Structure (5.2.3.2) of `size` bytes in I/O space."""
    return bytes((1, 8 * size, 0, size)) + port.to_bytes(8, "little")


def _fadt(fields: dict[str, int]) -> bytes:
    body = bytearray(FADT_SIZE - HEADER_SIZE)
    for name, value in fields.items():
        offset, size = FADT_FIELDS[name]
        offset -= HEADER_SIZE
        body[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(body)


def _with_checksum(data: bytes, at: int, length: int) -> bytes:
    """`data` whose first `length` bytes add up to 0 by the byte at `at`."""
    summed = bytearray(data)
    summed[at] = -sum(summed[:length]) & 0xFF
    return bytes(summed)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    table = signature + _u32(HEADER_SIZE + len(body)) + bytes((revision, 0))
    table += OEM_ID + OEM_TABLE_ID + _u32(1) + CREATOR_ID + _u32(1) + body
    return _with_checksum(table, 9, len(table))


def _rsdp(xsdt: int) -> bytes:
    rsdp = b"RSD PTR \0" + OEM_ID + b"\2" + _u32(0) + _u32(RSDP_SIZE)
    rsdp += xsdt.to_bytes(8, "little") + bytes(4)
    return _with_checksum(_with_checksum(rsdp, 8, RSDP_V1_SIZE), 32, RSDP_SIZE)
