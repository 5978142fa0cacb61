"""cpr.bus: which device answers, and how accesses are split."""

from __future__ import annotations

import pytest

from cpr.bus import AddressSpace, Region


class Recorder:
    """A device that notes accesses and reads as offset + 0x10."""

    def __init__(self) -> None:
        self.log: list[tuple] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        return offset + 0x10

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))

    def region(self, base: int, length: int, access_size: int = 1) -> Region:
        return Region(base, length, self.read, self.write, "recorder", access_size)


def test_byte_device_gets_wide_accesses_in_pieces():
    space, device = AddressSpace(), Recorder()
    space.add(device.region(0x100, 4))
    assert space.read(0x100, 4) == 0x13121110
    space.write(0x101, 2, 0xBBAA)
    assert device.log[-2:] == [("write", 1, 1, 0xAA), ("write", 2, 1, 0xBB)]


def test_wide_device_gets_whole_accesses():
    space, device = AddressSpace(), Recorder()
    space.add(device.region(0x100, 4, access_size=4))
    space.write(0x100, 4, 0x12345678)
    assert device.log == [("write", 0, 4, 0x12345678)]


def test_access_over_the_end_of_a_region_reads_ones_there():
    space, device = AddressSpace(), Recorder()
    space.add(device.region(0x100, 1))
    assert space.read(0x100, 2) == 0xFF10


def test_nothing_there():
    space = AddressSpace()
    assert space.read(0x5000, 4) == 0xFFFFFFFF
    space.write(0x5000, 4, 1)


def test_overlap_is_refused_and_remove_is_the_inverse_of_add():
    space, device = AddressSpace(), Recorder()
    space.add(device.region(0x100, 8))
    with pytest.raises(ValueError, match="overlaps recorder"):
        space.add(device.region(0x107, 1))
    space.remove(0x100, 8)
    space.add(device.region(0x107, 1))
