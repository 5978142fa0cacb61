"""ACPI: AML's encodings, the tables around it, and what the devices of a PC say."""

from __future__ import annotations

import pytest

from cpr.acpi import aml
from cpr.acpi.tables import (
    FACS_ADDRESS,
    TABLES_ADDRESS,
    Acpi,
    waking_vector,
)
from cpr.devices.apic import LocalApic
from cpr.devices.apic_bus import ApicBus
from cpr.devices.ioapic import IOApic
from cpr.devices.mc146818rtc import Mc146818Rtc
from cpr.devices.piix4_pm import Piix4Pm
from cpr.devices.port92 import Port92
from cpr.devices.serial import Serial


def number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


@pytest.mark.parametrize(
    ("made", "bytes_"),
    [
        (aml.integer(0), "00"),
        (aml.integer(1), "01"),
        (aml.integer(0xFF), "0aff"),
        (aml.integer(0x1234), "0b3412"),
        (aml.integer(0x12345678), "0c78563412"),
        (aml.integer(1 << 40), "0e0000000000010000"),
        (aml.eisa_id("PNP0501"), "0c41d00501"),
        (aml.string("hi"), "0d686900"),
        (aml.path("_HID"), "5f484944"),
        (aml.path("\\_SB.PCI0"), "5c2e5f53425f50434930"),
        (aml.name("_S5", aml.package(aml.integer(0), aml.integer(0))), "085f53355f1204020000"),
        (aml.resources(aml.irq(4)), "11080a052210007900"),
        (aml.io_ports(0x3F8, 8), "4701f803f8030108"),
        (aml.bus_range(0, 255), "880d00020c0000000000ff0000000001"),
    ],
)
def test_encodings(made: bytes, bytes_: str) -> None:
    assert made.hex() == bytes_


@pytest.mark.parametrize("size", [10, 58, 59, 60, 61, 62, 4000, 4090, 4095, 5000])
def test_lengths_count_themselves(size: int) -> None:
    data = aml.scope("_SB", bytes(size))
    more = data[1] >> 6
    length = data[1] if not more else data[1] & 15 | number(data, 2, more) << 4
    assert length == len(data) - 1


def tables(*devices) -> dict[bytes, bytes]:
    """The tables that these devices lead to, by signature."""
    acpi = Acpi()
    for device in devices:
        device.describe(acpi)
    image = acpi.build()

    def table(address: int) -> bytes:
        offset = address - TABLES_ADDRESS
        return image[offset : offset + number(image, offset + 4, 4)]

    assert image[:8] == b"RSD PTR "
    assert sum(image[:20]) % 256 == sum(image[:36]) % 256 == 0
    xsdt = table(number(image, 24, 8))
    found = {b"XSDT": xsdt}
    for place in range(36, len(xsdt), 8):
        each = table(number(xsdt, place, 8))
        found[each[:4]] = each
    found[b"DSDT"] = table(number(found[b"FACP"], 140, 8))
    assert all(sum(each) % 256 == 0 for each in found.values())
    found[b"FACS"] = table(FACS_ADDRESS)
    return found


def test_what_devices_say() -> None:
    bus = ApicBus()
    apics = [LocalApic(index, bus) for index in range(2)]
    found = tables(*apics, IOApic(bus), Port92(), Piix4Pm(), Mc146818Rtc(), Serial(0))
    fadt, madt, dsdt = found[b"FACP"], found[b"APIC"], found[b"DSDT"]
    assert (number(fadt, 46, 2), number(fadt, 56, 4), number(fadt, 64, 4)) == (9, 0x600, 0x604)
    assert number(fadt, 76, 4) == 0x608
    assert fadt[116:129] == bytes((1, 8, 0, 1, 0x92, 0, 0, 0, 0, 0, 0, 0, 1))
    assert fadt[108] == 0x32
    assert not number(fadt, 109, 2) & 0x22  # neither an 8042, nor no RTC
    kinds = []
    place = 44
    while place < len(madt):
        kinds.append(madt[place])
        place += madt[place + 1]
    assert kinds == [0, 4, 0, 1, 2, 2]
    assert bytes((2, 10, 0, 0, 2, 0, 0, 0, 0, 0)) in madt
    assert bytes((2, 10, 0, 9, 9, 0, 0, 0, 0x0D, 0)) in madt
    for name in (b"_S3_", b"_S5_", b"RTC_", b"COM1"):
        assert name in dsdt


def test_what_no_device_says_is_not_there() -> None:
    found = tables()
    assert number(found[b"FACP"], 109, 2) & 0x20  # no RTC
    assert not number(found[b"FACP"], 112, 4) & 1 << 10  # no reset register
    assert b"COM1" not in found[b"DSDT"]
    assert b"MCFG" not in found


def test_waking_vector() -> None:
    facs = tables()[b"FACS"]
    assert waking_vector(facs) == 0
    assert waking_vector(facs[:12] + b"\x00\x10\x09\x00" + facs[16:]) == 0x91000
    assert waking_vector(b"\xff" * 64) == 0
