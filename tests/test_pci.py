"""The PCI host, configuration space, BARs, MSI and MSI-X."""

from __future__ import annotations

import pytest
from fake_platform import FakePlatform
from hypothesis import given, settings
from hypothesis import strategies as st

from cpr.constants import PAGE_SIZE
from cpr.devices import pci_config
from cpr.devices.pci import ECAM_BASE, PciFunction, PciHost, parse_slot
from cpr.devices.pci_config import Bar, ConfigSpace
from cpr.devices.pci_msi import MsiCapability, MsixCapability
from cpr.devices.vfio_options import parse_host
from cpr.devices.vfio_regions import mappable
from cpr.errors import ConfigError
from cpr.uapi.vfio_info import RegionInfo


class Registers(PciFunction):
    """A function whose configuration space is plain memory."""

    def __init__(self) -> None:
        self.data = bytearray(4096)

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.data[offset : offset + size] = value.to_bytes(size, "little")


@pytest.fixture
def platform():
    platform = FakePlatform()
    yield platform
    platform.loop.close()


@pytest.fixture
def host(platform):
    host = PciHost()
    host.realize(platform)
    yield host
    host.unrealize()
    assert platform.bus.io.regions == platform.bus.memory.regions == []


def address(slot: int, register: int, bus: int = 0, function: int = 0) -> int:
    return 1 << 31 | bus << 16 | slot << 11 | function << 8 | register


def test_both_ways_reach_the_same_registers(platform, host) -> None:
    function = Registers()
    host.add(function)
    assert function.slot == 1
    bus = platform.bus
    bus.io_write(0xCF8, 4, address(1, 0x40))
    bus.io_write(0xCFC, 4, 0x11223344)
    bus.io_write(0xCFE, 2, 0x5566)
    assert bus.io_read(0xCF8, 4) == address(1, 0x40)
    assert bus.io_read(0xCFC, 4) == 0x55663344
    assert bus.io_read(0xCFD, 1) == 0x33
    assert bus.mmio_read(ECAM_BASE + (1 << 15) + 0x40, 4) == 0x55663344
    bus.mmio_write(ECAM_BASE + (1 << 15) + 0x800, 4, 0xCAFE)  # beyond what 0xcf8 reaches
    assert function.data[0x800:0x802] == b"\xfe\xca"


def test_empty_slots_and_other_functions_read_ones(platform, host) -> None:
    host.add(Registers())
    bus = platform.bus
    for place in (address(2, 0), address(1, 0, function=1), address(1, 0, bus=1)):
        bus.io_write(0xCF8, 4, place)
        assert bus.io_read(0xCFC, 4) == 0xFFFFFFFF
        bus.io_write(0xCFC, 4, 0)
    bus.io_write(0xCF8, 4, address(0, 0) & ~(1 << 31))
    assert bus.io_read(0xCFC, 4) == 0xFFFFFFFF
    assert bus.mmio_read(ECAM_BASE + (5 << 15), 4) == 0xFFFFFFFF


def test_host_bridge_tells_where_ecam_is(platform, host) -> None:
    bus = platform.bus
    bus.io_write(0xCF8, 4, address(0, 0))
    assert bus.io_read(0xCFC, 4) == 0x29C08086
    bus.io_write(0xCF8, 4, address(0, 0x60))
    assert bus.io_read(0xCFC, 4) == ECAM_BASE | 1
    bus.io_write(0xCFC, 4, 0)
    assert bus.io_read(0xCFC, 4) == ECAM_BASE | 1


def test_config_address_survives(platform, host) -> None:
    """An update between the two halves of an access."""
    platform.bus.io_write(0xCF8, 4, address(3, 0x10))
    other = PciHost()
    other.restore(host.save())
    assert other.save() == {"config_reg": address(3, 0x10)}


def test_lines_that_were_up_in_another_vmm(platform, host) -> None:
    """The interrupt chips have them as they were, which the devices may not."""
    host.set_intx(1, 1, False)  # at power-on
    assert platform.irqs == [(10, False)]
    host.restore(host.save())
    host.set_intx(1, 1, False)
    host.set_intx(5, 1, False)  # the same line
    host.set_intx(3, 1, True)
    host.set_intx(3, 1, True)
    assert platform.irqs == [(10, False), (10, False), (11, True)]


def test_slots(host) -> None:
    first, second = Registers(), Registers()
    host.add(first, 4)
    with pytest.raises(ConfigError, match="slot 4 function 0 not available"):
        host.add(second, 4)
    for _ in range(30):
        host.add(Registers())
    with pytest.raises(ConfigError, match="no slot/function available"):
        host.add(second)
    host.remove(first)
    host.add(second)
    assert second.slot == 4


@pytest.mark.parametrize(("text", "slot"), [("4", 4), ("04.0", 4), ("1f", 31)])
def test_addr_property(text: str, slot: int) -> None:
    assert parse_slot(text) == slot


@pytest.mark.parametrize("text", ["0", "20", "4.1", "x", ""])
def test_bad_addr_property(text: str) -> None:
    with pytest.raises(ConfigError, match=f"Property 'addr' doesn't take value '{text}'"):
        parse_slot(text)


def test_host_property() -> None:
    assert parse_host("3a:10.1") == "0000:3a:10.1"
    assert parse_host("1:00:1f.7") == "0001:00:1f.7"
    for text in ("", "0", "00:20.0", "00:01.8", "x:y.z", "0:0:0:0.0", "100:00.0", "00:01"):
        with pytest.raises(ConfigError, match=r"Property 'vfio-pci\.host' doesn't take value"):
            parse_host(text)


@pytest.mark.parametrize(("slot", "pin", "irq"), [(1, 1, 10), (1, 3, 11), (2, 1, 10), (3, 1, 11)])
def test_intx_wiring(host, slot: int, pin: int, irq: int) -> None:
    assert host.irq_of(slot, pin) == irq


# BARs: what a driver does with any of them.

FLAGS = st.sampled_from([0, 1, 4, 8, 12])
SHIFTS = st.integers(4, 40)


@st.composite
def bars(draw) -> Bar:
    flags = draw(FLAGS)
    limit = 8 if flags & 1 else 40 if flags & 4 else 28
    return Bar(draw(st.integers(0, 4)), 1 << draw(st.integers(4, limit)), flags)


@settings(deadline=None)
@given(bars(), st.integers(1, (1 << 52) - 1))
def test_sizing_and_placing(bar: Bar, wanted: int) -> None:
    config = ConfigSpace(256)
    bar.emulate(config)
    width = 8 if bar.wide else 4
    config.write(bar.register, width, (1 << 8 * width) - 1)
    ones = config.get(bar.register, width)
    low = 3 if bar.is_io else 15
    assert ones & low == bar.flags, "the type cannot be changed"
    assert (~(ones & ~low) + 1) & (1 << 8 * width) - 1 == bar.size
    both = pci_config.COMMAND_IO | pci_config.COMMAND_MEMORY
    assert bar.address(config, both) is None, "nowhere, while it is being sized"
    config.write(bar.register, width, wanted & (1 << 8 * width) - 1)
    placed = bar.address(config, both)
    limit = 1 << (16 if bar.is_io else 8 * width)
    base = wanted & (1 << 8 * width) - 1 & ~(bar.size - 1)
    if base and base + bar.size < limit:
        assert placed == base
    else:
        assert placed is None
    assert bar.address(config, 0) is None


@settings(deadline=None)
@given(st.integers(0, 250), st.sampled_from([1, 2, 4]), st.integers(0), st.integers(0))
def test_emulated_bits_are_ours_and_the_others_the_devices(
    offset: int, size: int, device: int, emulated: int
) -> None:
    every = (1 << 8 * size) - 1
    config = ConfigSpace(256)
    config.emulate(offset, size, 0x5A5A5A5A & every, emulated & every, 0)
    config.write(offset, size, every)
    mask = emulated & every
    expected = device & every & ~mask | 0x5A5A5A5A & mask
    assert config.merge(offset, size, device & every) == expected


@settings(deadline=None)
@given(
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(0, 1 << 18), st.integers(0, 1 << 13)), max_size=2),
)
def test_mapped_areas_leave_out_the_pages_of_the_holes(pages: int, holes: list) -> None:
    size = pages * PAGE_SIZE
    areas = mappable(RegionInfo(0, size, True, True, [(0, size)]), holes)
    mapped = {
        page
        for start, length in areas
        for page in range(start // PAGE_SIZE, (start + length) // PAGE_SIZE)
    }
    for start, length in areas:
        assert start % PAGE_SIZE == length % PAGE_SIZE == 0 and length and start + length <= size
    wanted = set(range(pages))
    for start, length in holes:
        if length:
            wanted -= set(range(start // PAGE_SIZE, (start + length - 1) // PAGE_SIZE + 1))
    assert mapped == wanted


# Messages.


@settings(deadline=None)
@given(st.booleans(), st.booleans(), st.integers(0, 5), st.integers(0, 7), st.integers(0, 0xFFFF))
def test_msi(wide: bool, masking: bool, capable: int, used: int, data: int) -> None:
    config = ConfigSpace(256)
    flags = capable << 1 | (0x80 if wide else 0) | (0x100 if masking else 0)
    msi = MsiCapability(config, 0x40, flags)
    assert not msi.enabled and msi.count == 1 << capable
    config.write(0x42, 2, 1 | used << 4)
    config.write(0x44, 4, 0xFEE01003)
    if wide:
        config.write(0x48, 4, 0x12)
    config.write(0x4C if wide else 0x48, 2, data)
    assert msi.enabled and msi.used == min(1 << used, msi.count)
    high = 0x12 << 32 if wide else 0
    for vector in range(msi.used):
        assert msi.message(vector) == (high | 0xFEE01000, data & ~(msi.used - 1) | vector)
    config.write(0x50 if wide else 0x4C, 4, 0xFFFFFFFF)
    assert msi.is_masked(0) == masking
    msi.set_pending(0, True)
    assert msi.is_pending(0) == masking
    msi.set_pending(0, False)
    assert not msi.is_pending(0)


@settings(deadline=None)
@given(st.integers(1, 2048), st.data())
def test_msix_table_and_pending_bits(count: int, data) -> None:
    config = ConfigSpace(256)
    msix = MsixCapability(config, 0x40, count - 1, 0x2003, 0x3004)
    assert (msix.table_bar, msix.table_offset, msix.pba_bar, msix.pba_offset) == (
        3,
        0x2000,
        4,
        0x3000,
    )
    vector = data.draw(st.integers(0, count - 1))
    assert msix.is_masked(vector) and not msix.enabled
    place = 16 * vector
    assert msix.write_table(place, 4, 0xFEE00000) == vector
    msix.write_table(place + 4, 4, 1)
    msix.write_table(place + 8, 4, 0x31)
    assert msix.write_table(place + 12, 4, 0) == vector
    assert msix.message(vector) == (0x1FEE00000, 0x31)
    assert not msix.is_masked(vector)
    config.write(0x42, 2, 0xC000)
    assert msix.enabled and msix.is_masked(vector), "the whole function is masked"
    config.write(0x42, 2, 0x8000)
    msix.set_pending(vector, True)
    assert msix.read_pba(vector // 64 * 8, 8) == 1 << vector % 64
    other = MsixCapability(ConfigSpace(256), 0x40, count - 1, 0, 0)
    encoded = msix.vmstate.encode(msix.save())
    assert len(encoded) == 16 * count + (count + 7) // 8, "QEMU's msix: table, then pending bits"
    other.restore(msix.save())
    assert other.save() == msix.save()
    assert other.is_pending(vector) and other.message(vector) == msix.message(vector)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_write_makes_the_msix_table_another_size(size: int) -> None:
    msix = MsixCapability(ConfigSpace(256), 0x40, 3, 0, 0x800)
    for offset in range(-8, msix.table_size + 8):
        value = (1 << 8 * size) - 1
        vector = msix.write_table(offset, size, value)
        inside = offset % size == 0 and 0 <= offset <= msix.table_size - size
        assert vector == (offset // 16 if inside else -1)
        assert len(msix.save()["table"]) == msix.table_size
        if inside:
            assert msix.read_table(offset, size) == value
    assert msix.vmstate.encode(msix.save())
