"""vfio-pci over an update, on a host that stands in for the kernel."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from descriptors import open_fds
from fake_vfio import (
    BAR_SIZE,
    MSI_AT,
    MSIX_AT,
    PBA,
    TABLE,
    FakeAccel,
    FakeDevice,
    FakeHost,
    FakeVmm,
)
from waiting import TIMEOUT

from cpr.devices.iommufd import IommufdBackend
from cpr.devices.pci import PciHost
from cpr.devices.vfio import Type1
from cpr.devices.vfio_cdev import Cdev
from cpr.devices.vfio_pci import VfioPci
from cpr.errors import ConfigError, CprError, KernelError, MigrationError, StateError
from cpr.state.cpr_state import CprState, VfioDevice
from cpr.state.fds import PreservedFds
from cpr.state.reader import BytesReader
from cpr.uapi import memlock, vfio

NAME = "0000:3a:10.1"
OTHER = "0000:3a:10.2"
BAR = 0xF8000000
MSI_ADDRESS = 0xFEE00000
EXEC = "cpr-exec"
KINDS = ["type1", "iommufd"]

# What nobody may do with a device that is in use.
FORBIDDEN = {
    "open_container",
    "open_group",
    "open_cdev",
    "open_iommufd",
    "get_device_fd",
    "set_container",
    "set_iommu",
    "bind_iommufd",
    "attach_iommufd_pt",
    "alloc_ioas",
    "alloc_hwpt",
    "map_dma",
    "map_file",
    "map_memory",
    "reset",
    "set_triggers",
    "set_unmask",
    "disable_irqs",
}


class Vmm(FakeVmm):
    """A VMM with vfio-pci devices by `kind`."""

    def __init__(
        self, host: FakeHost, kind: str, names: list[str], fds: PreservedFds | None = None
    ) -> None:
        super().__init__(host, fds)
        self.bus = PciHost()
        self.add_device(self.bus)
        self.pci: dict[str, VfioPci] = {}
        backend: Any = Type1(self.fds, self.add_device, host, host)
        if kind == "iommufd":
            self.iommufd = IommufdBackend("iommufd0", None, self.fds, 0, host)
            self.add_device(self.iommufd)
            backend = Cdev(self.iommufd, self.accel, self.fds, None, host, host)
        for name in names:
            self.pci[name] = VfioPci(name, "", None, backend, self.bus, self.fds, False, host, host)
            self.pci[name]._sysfs = f"/{name}"
            self.add_device(self.pci[name])

    def write(self, name: str, offset: int, size: int, value: int) -> None:
        self.pci[name].config_write(offset, size, value)

    def enable_msix(self, name: str) -> None:
        """What a guest's driver does."""
        self.write(name, 0x10, 4, BAR)
        self.write(name, 0x04, 2, 6)
        for vector in range(3):
            self.program(vector, MSI_ADDRESS, 0x40 + vector)
            self.mask(vector, False)
        self.write(name, MSIX_AT + 2, 2, 0x8000)

    def program(self, vector: int, address: int, data: int) -> None:
        entry = BAR + TABLE + 16 * vector
        self.platform.bus.mmio_write(entry, 8, address)
        self.platform.bus.mmio_write(entry + 8, 4, data)

    def mask(self, vector: int, masked: bool) -> None:
        self.platform.bus.mmio_write(BAR + TABLE + 16 * vector + 12, 4, int(masked))

    def taken(self) -> list:
        """The interrupts that the guest got, once."""
        self.platform.loop.iterate(0)
        self.accel.pump()
        taken, self.accel.delivered = self.accel.delivered, []
        return taken

    def successor(self, kind: str, state: CprState | None = None) -> Vmm:
        """The new image: it has copies of the descriptors, and the stream."""
        sections = self.save()
        state = state or self.copied_state()
        fds = PreservedFds()
        fds.take_over(state)
        self.host.log.clear()
        new = Vmm(self.host, kind, list(self.pci), fds)
        load(new, sections)
        fds.incoming = False
        return new

    def copied_state(self) -> CprState:
        state = CprState.decode(self.fds.state().encode())
        return CprState([(n, i, os.dup(fd)) for n, i, fd in state.fds], state.vfio_devices)


def load(vmm: Vmm, sections: dict[tuple[str, int], bytes], commit: bool = True) -> None:
    """Loads the stream; with `commit` the guest is this VMM's then."""
    for device in vmm.sections():
        data = sections[device.idstr, device.instance_id]
        reader = BytesReader(data)
        device.restore(device.vmstate.decode(reader, device.vmstate.version_id))
        assert reader.read(0) == b"" and reader.offset == len(data)
    if commit:
        for device in vmm.devices:
            device.take_over()


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices' sysfs folders are there."""
    real = os.path.isdir
    names = (f"/{NAME}", f"/{OTHER}")
    monkeypatch.setattr(os.path, "isdir", lambda path: path in names or real(path))


@pytest.fixture
def host() -> Iterator[FakeHost]:
    host = FakeHost({NAME: 26, OTHER: 27})
    yield host
    host.close()


@pytest.fixture
def make(host: FakeHost) -> Iterator[Callable[..., Vmm]]:
    made: list[Vmm] = []

    def make(kind: str = "type1", names: list[str] | None = None) -> Vmm:
        made.append(Vmm(host, kind, names or [NAME]))
        return made[-1]

    yield make
    for vmm in made:
        vmm.close()


def names_and_ids(vmm: Vmm) -> set[tuple[str, int]]:
    return {(name, id) for name, id, _ in vmm.fds.entries()}


def host_addresses(host: FakeHost) -> list[int | None]:
    return [m[1] for mappings in host.mappings.values() for m in mappings.values()]


# Descriptors.


def test_type1_names_and_ids_are_qemus(make) -> None:
    vmm = make()
    assert names_and_ids(vmm) == {
        ("vfio_group", 26),
        ("vfio_container_for_group", 26),
        (NAME, 0),
        (f"{NAME}_intx-interrupt", 0),
        (f"{NAME}_intx-unmask", 0),
        (f"{NAME}_req_notifier", 0),
    }
    vmm.enable_msix(NAME)
    vectors = {(f"{NAME}_{kind}", n) for kind in ("interrupt", "kvm_interrupt") for n in range(3)}
    assert {entry for entry in names_and_ids(vmm) if "interrupt" in entry[0]} == vectors


def test_iommufd_names_and_ids_are_qemus(make) -> None:
    vmm = make("iommufd")
    found = names_and_ids(vmm)
    assert {("iommufd0", 0), (NAME, 0)} <= found
    assert not {entry for entry in found if entry[0].startswith("vfio_")}
    assert vmm.fds.vfio_devices == [VfioDevice(NAME, 1, 2, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_given_back(host: FakeHost, kind: str) -> None:
    before = open_fds()
    vmm = Vmm(host, kind, [NAME, OTHER])
    vmm.enable_msix(NAME)
    vmm.close()
    assert vmm.fds.entries() == vmm.fds.vfio_devices == []
    assert not vmm.accel.irqfds and not vmm.accel.slots and not vmm.accel.vfio_files
    assert all(not mappings for mappings in host.mappings.values())
    for device in host.devices.values():
        for triggers in device.triggers.values():
            for fd in triggers.values():
                if fd >= 0:
                    os.close(fd)
    assert len(open_fds()) <= len(before) + 12  # the host's own copies


@pytest.mark.parametrize("kind", KINDS)
def test_guest_ram_is_mapped_at_once_and_when_it_grows(make, host: FakeHost, kind: str) -> None:
    vmm = make(kind)
    (mappings,) = host.mappings.values() if kind == "iommufd" else [*host.mappings.values()]
    assert sorted(mappings) == [0, 0x100000]
    vmm.platform.memory.add_section(1 << 32, 1 << 20, vmm.ram, 0, False, "more")
    assert sorted(mappings) == [0, 0x100000, 1 << 32]


# An update.


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_opened_or_changed_by_the_new_vmm(make, host: FakeHost, kind: str) -> None:
    vmm = make(kind, [NAME, OTHER])
    vmm.enable_msix(NAME)
    assert vmm.blockers() == []
    vmm.prepare()
    assert vmm.accel.irqfds == {} and vmm.accel.vfio_files == set()
    new = vmm.successor(kind)
    assert not set(host.log) & FORBIDDEN, host.log
    assert names_and_ids(new) == names_and_ids(vmm)
    assert new.pci[NAME].config.data == vmm.pci[NAME].config.data
    assert new.accel.slots.keys() == vmm.accel.slots.keys()
    assert len(new.accel.vfio_files) == 2
    if kind == "type1":
        addresses = [address for address in host_addresses(host) if address is not None]
        assert len(addresses) == len(host_addresses(host))
        assert {a & ~0xFFFFFF for a in addresses} & {new.ram.host & ~0xFFFFFF}
    else:
        assert host.log.count("change_process") == 1
    new.platform.loop.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_vmm_that_does_not_get_the_guest_has_touched_nothing(
    make, host: FakeHost, kind: str
) -> None:
    """It has loaded the whole guest, and ends in an orderly way."""
    device = host.devices[NAME]
    vmm = make(kind)
    vmm.enable_msix(NAME)
    files, irqfds = set(vmm.accel.vfio_files), dict(vmm.accel.irqfds)
    mappings = {fd: dict(each) for fd, each in host.mappings.items()}
    vmm.prepare()
    sections = vmm.save()
    fds = PreservedFds()
    fds.take_over(vmm.copied_state())
    host.log.clear()
    new = Vmm(host, kind, [NAME], fds)
    load(new, sections, commit=False)
    new.pci[NAME].reset()
    device.raise_irq(vfio.MSIX_IRQ, 1)
    assert new.taken() == [] and new.accel.vfio_files == set()
    new.close()
    touching = {"map_dma", "unmap_dma", "unmap", "update_vaddr", "change_process", "set_triggers"}
    touching |= {"unmask", "disable_irqs", "reset", "write_region"}
    assert not set(host.log) & (FORBIDDEN | touching), host.log
    vmm.rollback()
    assert vmm.taken() == [(MSI_ADDRESS, 0x41)]
    assert (vmm.accel.vfio_files, vmm.accel.irqfds) == (files, irqfds)
    assert host.mappings == mappings


def test_old_addresses_are_invalid_from_the_save_on(make, host: FakeHost) -> None:
    vmm = make()
    vmm.prepare()
    assert None not in host_addresses(host)
    vmm.save()
    assert set(host_addresses(host)) == {None}
    vmm.rollback()
    assert None not in host_addresses(host)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resizes", [False, True])
def test_interrupts_come_once(make, host: FakeHost, kind: str, resizes: bool) -> None:
    device = host.devices[NAME]
    device.resizes = resizes
    vmm = make(kind)
    vmm.enable_msix(NAME)
    for vector in range(3):
        device.raise_irq(vfio.MSIX_IRQ, vector)
        assert vmm.taken() == [(MSI_ADDRESS, 0x40 + vector)]
    vmm.prepare()
    device.raise_irq(vfio.MSIX_IRQ, 1)
    device.raise_irq(vfio.MSIX_IRQ, 1)  # two that nobody took are one, as for a CPU
    assert vmm.taken() == []
    new = vmm.successor(kind)
    assert new.taken() == [(MSI_ADDRESS, 0x41)]
    device.raise_irq(vfio.MSIX_IRQ, 2)
    assert new.taken() == [(MSI_ADDRESS, 0x42)]
    assert new.taken() == []
    new.platform.loop.close()


def test_masked_vector_stays_pending_over_the_update(make, host: FakeHost) -> None:
    device = host.devices[NAME]
    vmm = make()
    vmm.enable_msix(NAME)
    vmm.mask(1, True)
    device.raise_irq(vfio.MSIX_IRQ, 1)
    assert vmm.taken() == []
    assert vmm.platform.bus.mmio_read(BAR + PBA, 8) == 1 << 1
    vmm.mask(2, True)
    vmm.prepare()
    device.raise_irq(vfio.MSIX_IRQ, 2)  # while nobody listens
    new = vmm.successor("type1")
    assert new.taken() == []
    assert new.platform.bus.mmio_read(BAR + PBA, 8) == 1 << 1 | 1 << 2
    new.mask(1, False)
    new.mask(2, False)
    assert new.taken() == [(MSI_ADDRESS, 0x41), (MSI_ADDRESS, 0x42)]
    device.raise_irq(vfio.MSIX_IRQ, 1)
    assert new.taken() == [(MSI_ADDRESS, 0x41)]
    new.platform.loop.close()


def test_msi_over_an_update(make, host: FakeHost) -> None:
    device = host.devices[NAME]
    vmm = make()
    vmm.write(NAME, MSI_AT + 4, 4, MSI_ADDRESS)
    vmm.write(NAME, MSI_AT + 12, 2, 0x50)
    vmm.write(NAME, MSI_AT + 2, 2, 0x11)  # two vectors
    assert vfio.INTX_IRQ not in device.triggers
    device.raise_irq(vfio.MSI_IRQ, 1)
    assert vmm.taken() == [(MSI_ADDRESS, 0x51)]
    vmm.write(NAME, MSI_AT + 16, 4, 1)  # masks the first
    device.raise_irq(vfio.MSI_IRQ, 0)
    vmm.prepare()
    new = vmm.successor("type1")
    device.raise_irq(vfio.MSI_IRQ, 1)
    assert new.taken() == [(MSI_ADDRESS, 0x51)]
    assert new.pci[NAME].config_read(MSI_AT + 20, 4) == 1
    new.write(NAME, MSI_AT + 16, 4, 0)
    assert new.taken() == [(MSI_ADDRESS, 0x50)]
    new.write(NAME, MSI_AT + 2, 2, 0)
    assert (f"{NAME}_interrupt", 0) not in names_and_ids(new)
    assert (f"{NAME}_intx-interrupt", 0) in names_and_ids(new)
    new.platform.loop.close()


def test_intx_over_an_update(make, host: FakeHost) -> None:
    device = host.devices[NAME]
    vmm = make()
    ((gsi, _),) = vmm.accel.irqfds
    device.raise_irq(vfio.INTX_IRQ)
    assert vmm.taken() == [gsi]
    vmm.prepare()
    device.raise_irq(vfio.INTX_IRQ)
    new = vmm.successor("type1")
    assert new.taken() == [gsi]
    ((new_gsi, _),) = new.accel.irqfds
    assert new_gsi == gsi and all(fd >= 0 for fd in new.accel.irqfds.values())
    assert "unmask" in host.log, "a line that is still up must come up again"
    new.platform.loop.close()


def test_vector_that_was_unmasked_after_the_descriptors_went(make, host: FakeHost) -> None:
    """As over cpr-transfer, where the guest runs on for a moment: this one is made anew."""
    vmm = make()
    vmm.enable_msix(NAME)
    vmm.mask(2, True)
    state = vmm.copied_state()
    without = [e for e in state.fds if e[:2] not in vectors_of(2)]
    vmm.mask(2, False)
    vmm.prepare()
    new = vmm.successor("type1", CprState(without, []))
    host.devices[NAME].raise_irq(vfio.MSIX_IRQ, 2)
    assert new.taken() == [(MSI_ADDRESS, 0x42)]
    assert host.log.count("set_triggers") == 1
    new.platform.loop.close()


def vectors_of(number: int) -> set[tuple[str, int]]:
    return {(f"{NAME}_interrupt", number), (f"{NAME}_kvm_interrupt", number)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_fails_leaves_everything_as_it_was(make, host: FakeHost, kind: str) -> None:
    """As an exec that fails after the addresses were made invalid."""
    device = host.devices[NAME]
    vmm = make(kind)
    vmm.enable_msix(NAME)
    files, irqfds = set(vmm.accel.vfio_files), dict(vmm.accel.irqfds)
    for _ in range(3):
        vmm.prepare()
        vmm.save()
        device.raise_irq(vfio.MSIX_IRQ, 0)
        vmm.rollback()
        assert vmm.taken() == [(MSI_ADDRESS, 0x40)]
        assert vmm.accel.vfio_files == files
        assert vmm.accel.irqfds == irqfds
        assert None not in host_addresses(host)
        vmm.rollback()  # once more does no harm
    assert vmm.blockers() == []


def test_reset_by_the_guest_after_an_update(make, host: FakeHost) -> None:
    vmm = make()
    vmm.enable_msix(NAME)
    vmm.prepare()
    new = vmm.successor("type1")
    new.pci[NAME].reset()
    assert host.log.count("reset") == 1
    assert new.accel.slots == {}
    assert new.pci[NAME].config_read(0x10, 4) == 0
    assert (f"{NAME}_intx-interrupt", 0) in names_and_ids(new)
    assert not {e for e in names_and_ids(new) if e[0].endswith("kvm_interrupt")}
    new.platform.loop.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_of_a_transfer_leaves_the_device_alone(host: FakeHost, kind: str) -> None:
    vmm = Vmm(host, kind, [NAME])
    vmm.enable_msix(NAME)
    vmm.prepare("cpr-transfer")
    new = vmm.successor(kind)
    before = [dict(mappings) for mappings in host.mappings.values()]
    host.log.clear()
    vmm.close()
    assert host.log == []
    assert [dict(mappings) for mappings in host.mappings.values()] == before
    host.devices[NAME].raise_irq(vfio.MSIX_IRQ, 0)
    assert new.taken() == [(MSI_ADDRESS, 0x40)]
    new.close()


# BARs.


def test_bar_is_memory_but_for_the_msix_pages(make) -> None:
    vmm = make()
    vmm.enable_msix(NAME)
    assert vmm.accel.slots == {(BAR, TABLE): 0x7000_0000_0000}
    vmm.platform.bus.mmio_write(BAR + 0x2800, 4, 0x12345678)  # beside the table, in its page
    assert vmm.platform.bus.mmio_read(BAR + 0x2800, 4) == 0x12345678
    assert vmm.platform.bus.mmio_read(BAR + TABLE + 24, 4) == 0x41
    vmm.write(NAME, 0x04, 2, 0)
    assert vmm.accel.slots == {}
    assert vmm.platform.bus.memory.find(BAR + TABLE) is None


def test_bar_sizing_is_the_usual(make) -> None:
    vmm = make()
    vmm.write(NAME, 0x10, 4, 0xFFFFFFFF)
    assert vmm.pci[NAME].config_read(0x10, 4) == (~(BAR_SIZE - 1) & 0xFFFFFFFF)
    vmm.write(NAME, 0x04, 2, 2)  # decoding while it is sized: at the top there is the BIOS
    assert vmm.accel.slots == {}


# Refusals, and what goes wrong.


def test_blockers_have_qemus_texts(make, host: FakeHost) -> None:
    vmm = make()
    host.features["unmaps_all"] = False
    assert vmm.blockers() == ["VFIO container does not support VFIO_UNMAP_ALL"]
    host.features["updates_vaddr"] = False
    assert vmm.blockers("cpr-transfer") == ["VFIO container does not support VFIO_UPDATE_VADDR"]
    assert vmm.blockers("cpr-reboot") == []
    assert vmm.blockers("normal") == [f"{NAME}: VFIO migration is not supported in kernel"]


def test_iommufd_blockers_have_qemus_texts(make, host: FakeHost, monkeypatch) -> None:
    vmm = make("iommufd")
    host.fail["change_process"] = lambda locked: errno.ENOTTY
    text = "vfio iommufd backend does not support IOMMU_IOAS_CHANGE_PROCESS"
    assert vmm.blockers() == [text]
    host.fail["change_process"] = lambda locked: errno.EINVAL
    assert "some memory regions do not support IOMMU_IOAS_CHANGE_PROCESS" in vmm.blockers()[0]
    host.fail.clear()
    monkeypatch.setattr(memlock, "has_room", lambda size: size < 100 << 20)
    assert "counts locked memory before the old one's is taken off" in vmm.blockers()[0]


def test_passed_descriptor_needs_an_id(make) -> None:
    vmm = make()
    vmm.pci[NAME]._nameless = True
    assert re.fullmatch(r"vfio device with fd=\d+ needs an id property", vmm.blockers()[0])


def test_reboot_only_where_the_guest_sleeps(make) -> None:
    vmm = make()
    with pytest.raises(MigrationError, match="only supports cpr-reboot for runstate suspended"):
        vmm.prepare("cpr-reboot")
    vmm.rollback()
    vmm.platform.suspended = True
    vmm.prepare("cpr-reboot")
    assert [key for key in vmm.save() if "vfio" in key[0]] == []
    assert vmm.accel.irqfds
    vmm.rollback()


def test_device_that_has_gone_is_refused_before_the_exec(make, monkeypatch) -> None:
    vmm = make()
    irqfds = dict(vmm.accel.irqfds)
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    with pytest.raises(MigrationError, match=f"vfio {NAME} has gone from the host"):
        vmm.prepare()
    vmm.rollback()
    assert vmm.accel.irqfds == irqfds


@pytest.mark.parametrize(
    "missing", [(NAME, 0), ("vfio_group", 26), ("vfio_container_for_group", 26)]
)
def test_missing_descriptor_is_named(make, host: FakeHost, missing: tuple[str, int]) -> None:
    vmm = make()
    vmm.prepare()
    state = vmm.copied_state()
    rest = CprState([entry for entry in state.fds if entry[:2] != missing], [])
    with pytest.raises(StateError, match=f"no descriptor '{missing[0]}' id {missing[1]}"):
        vmm.successor("type1", rest)
    assert not set(host.log) & FORBIDDEN


@pytest.mark.parametrize("missing", ["device", "ids"])
def test_missing_iommufd_device_is_named(make, host: FakeHost, missing: str) -> None:
    vmm = make("iommufd")
    vmm.prepare()
    state = vmm.copied_state()
    if missing == "device":
        state.fds = [entry for entry in state.fds if entry[0] != NAME]
    else:
        state.vfio_devices = []
    with pytest.raises(StateError, match=f"'{NAME}'"):
        vmm.successor("iommufd", state)
    assert not set(host.log) & FORBIDDEN


def test_device_of_another_group_is_refused(make, host: FakeHost) -> None:
    """The host has been wired anew between two updates: the CPR state has another group."""
    vmm = make()
    vmm.prepare()
    sections = vmm.save()
    fds = PreservedFds()
    fds.take_over(vmm.copied_state())
    host.devices[NAME].group = 99
    host.log.clear()
    with pytest.raises(StateError, match="no descriptor 'vfio_group' id 99"):
        Vmm(host, "type1", [NAME], fds)
    assert sections and not set(host.log) & FORBIDDEN


def test_unbound_device_is_refused(host: FakeHost) -> None:
    host.devices[NAME].group = 26
    del host.devices[NAME]
    host.devices[OTHER] = FakeDevice(27)
    vmm = FakeVmm(host)
    type1 = Type1(vmm.fds, vmm.add_device, host, host)
    with pytest.raises(ConfigError, match=f"vfio {NAME}: no iommu_group found.*bind {NAME}"):
        type1.open(NAME, f"/{NAME}")
    vmm.close()


def test_a_mapping_that_gets_no_address_costs_the_guest_nothing(make, host, capfd) -> None:
    vmm = make()
    host.fail["update_vaddr"] = lambda iova: errno.ENOMEM if iova else 0
    vmm.prepare()
    vmm.save()
    vmm.rollback()
    assert "DMA goes on; updates are refused until this works" in capfd.readouterr().err
    assert host_addresses(host).count(None) == 1, "the others have theirs"
    assert "VFIO container has no addresses since the last update" in vmm.blockers()[0]
    host.fail.clear()
    assert vmm.blockers() == []
    assert None not in host_addresses(host)


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_vmm_runs_the_guest_although_it_may_not_lock(make, host, capfd, kind) -> None:
    vmm = make(kind)
    vmm.prepare()
    state = vmm.copied_state()
    sections = vmm.save()
    host.fail["update_vaddr"] = lambda iova: errno.ENOMEM
    host.fail["change_process"] = lambda locked: errno.ENOMEM
    fds = PreservedFds()
    fds.take_over(state)
    new = Vmm(host, kind, [NAME], fds)
    load(new, sections)
    assert "DMA goes on; updates are refused until this works" in capfd.readouterr().err
    assert new.blockers() != []
    host.fail.clear()
    assert new.blockers() == []
    new.platform.loop.close()


def test_a_failed_save_is_walked_back(make, host: FakeHost) -> None:
    vmm = make()
    host.fail["invalidate_vaddrs"] = lambda: errno.EINVAL
    vmm.prepare()
    with pytest.raises(KernelError):
        vmm.save()
    vmm.rollback()
    assert None not in host_addresses(host)
    assert "update_vaddr" not in host.log


def test_iommufd_that_cannot_change_hands_fails_the_save(make, host: FakeHost) -> None:
    vmm = make("iommufd")
    host.fail["change_process"] = lambda locked: errno.EINVAL
    vmm.prepare()
    with pytest.raises(MigrationError, match="some memory regions do not support"):
        vmm.save()
    vmm.rollback()


@pytest.mark.parametrize("kind", KINDS)
def test_one_device_twice(host: FakeHost, kind: str) -> None:
    vmm = Vmm(host, kind, [NAME])
    before = names_and_ids(vmm)
    again = VfioPci(NAME, "", None, vmm.pci[NAME]._backend, vmm.bus, vmm.fds, False, host, host)
    with pytest.raises(ConfigError, match=f"vfio {NAME}: device is already attached|no iommu"):
        again._sysfs = f"/{NAME}"
        again.realize(vmm.platform)
    assert names_and_ids(vmm) == before
    assert vmm.bus._find(0) is not None, "the host bridge stays"
    vmm.close()


def test_vectors_that_the_host_refuses_cost_the_guest_interrupts_only(make, host, capfd) -> None:
    vmm = make()
    host.fail["set_triggers"] = lambda index: errno.ENOSPC if index == vfio.MSIX_IRQ else 0
    vmm.enable_msix(NAME)
    assert f"warning: vfio {NAME}" in capfd.readouterr().err
    host.fail.clear()
    vmm.write(NAME, MSIX_AT + 2, 2, 0)
    vmm.enable_msix(NAME)
    host.devices[NAME].raise_irq(vfio.MSIX_IRQ, 0)
    assert vmm.taken() == [(MSI_ADDRESS, 0x40)]


@pytest.mark.parametrize("failing", ["add_irqfd", "add_vfio_file"])
@pytest.mark.parametrize("moment", ["rollback", "take_over"])
@pytest.mark.parametrize("intx", [False, True], ids=["msix", "intx"])
def test_what_fails_after_an_update_costs_nothing_else(
    make, host, capfd, monkeypatch, failing: str, moment: str, intx: bool
) -> None:
    """An interrupt that KVM has no room for is counted, and comes when it has."""
    interrupts = failing == "add_irqfd"
    refused = [False, True, False] if interrupts and not intx else [True] * (1 + interrupts)
    real = getattr(FakeAccel, failing)

    def fails(accel: FakeAccel, *arguments: int) -> None:
        if refused and refused.pop(0):
            raise KernelError(failing, errno.EMFILE)
        real(accel, *arguments)

    device = host.devices[NAME]
    vmm = make("iommufd")
    if not intx:
        vmm.enable_msix(NAME)
    vmm.prepare()
    index, vectors = (vfio.INTX_IRQ, [0]) if intx else (vfio.MSIX_IRQ, [0, 1, 2])
    for vector in vectors:
        device.raise_irq(index, vector)
    monkeypatch.setattr(FakeAccel, failing, fails)
    if moment == "rollback":
        vmm.rollback()
        new = vmm
    else:
        new = vmm.successor("iommufd")
    assert f"{failing}: Too many open files" in capfd.readouterr().err
    taken = new.taken()
    assert len(taken) == len(vectors) - interrupts
    deadline = time.monotonic() + TIMEOUT
    while len(taken) < len(vectors):
        assert time.monotonic() < deadline, "it is not tried again"
        new.platform.loop.iterate(10_000_000)
        taken += new.taken()
    assert len(set(taken)) == len(vectors)
    assert len(new.accel.irqfds) == len(vectors)
    assert "Too many" not in capfd.readouterr().err
    if new is not vmm:
        new.platform.loop.close()


def test_a_line_that_cannot_be_unmasked_is_unmasked_later(make, host, monkeypatch) -> None:
    refused, done = [True], []

    def unmask(host: FakeHost, device: Any, index: int) -> None:
        if refused:
            refused.pop()
            raise KernelError("unmask", errno.EIO)
        done.append(index)

    vmm = make("iommufd")
    vmm.prepare()
    monkeypatch.setattr(FakeHost, "unmask", unmask)
    vmm.rollback()
    deadline = time.monotonic() + TIMEOUT
    while not done:
        assert time.monotonic() < deadline, "it is not tried again"
        vmm.platform.loop.iterate(10_000_000)
    assert done == [vfio.INTX_IRQ]
    assert len(vmm.accel.irqfds) == 1


@pytest.mark.parametrize("moment", ["before", "pause"])
def test_an_error_is_told_who_has_the_guest(make, host: FakeHost, moment: str) -> None:
    """One that comes in the pause, and one after which the guest could not be stopped before."""
    device = host.devices[NAME]
    device.tells_errors = True
    vmm = make()
    told = vmm.platform.errors
    if moment == "before":
        device.raise_irq(vfio.ERR_IRQ)
        vmm.taken()
        assert len(told) == 1
    vmm.prepare()
    if moment == "pause":
        device.raise_irq(vfio.ERR_IRQ)
    before = len(told)
    fds = PreservedFds()
    fds.take_over(vmm.copied_state())
    refuses = Vmm(host, "type1", [NAME], fds)
    load(refuses, vmm.save(), commit=False)
    for each in (refuses, vmm):
        each.taken()
    assert refuses.platform.errors == [] and len(told) == before
    vmm.rollback()
    vmm.taken()
    assert len(told) == before + 1
    vmm.prepare()
    new = vmm.successor("type1")
    new.taken()
    assert len(new.platform.errors) == 1 and len(told) == before + 1
    new.pci[NAME].reset()
    new.prepare()
    last = new.successor("type1")
    last.taken()
    assert last.platform.errors == []
    for each in (refuses, new, last):
        each.platform.loop.close()


def test_device_that_has_gone_at_the_end(host: FakeHost) -> None:
    vmm = Vmm(host, "type1", [NAME])
    host.fail["disable_irqs"] = lambda index: errno.ENODEV
    vmm.close()
    assert vmm.fds.entries() == []


# Groups and containers.


def test_two_devices_of_one_group(make, host: FakeHost) -> None:
    host.devices[OTHER].group = 26
    vmm = make("type1", [NAME, OTHER])
    assert host.log.count("open_group") == host.log.count("open_container") == 1
    vmm.prepare()
    new = vmm.successor("type1")
    assert names_and_ids(new) == names_and_ids(vmm)
    assert host.log.count("update_vaddr") == 2
    new.platform.loop.close()


def test_two_groups_share_a_container(make, host: FakeHost) -> None:
    vmm = make("type1", [NAME, OTHER])
    assert host.log.count("open_container") == 1
    containers = {vmm.fds.find("vfio_container_for_group", group) for group in (26, 27)}
    assert len(containers) == 1
    vmm.prepare()
    new = vmm.successor("type1")  # its copies have numbers of their own
    assert host.log.count("update_vaddr") == 2
    assert [d.instance_id for d in new.devices if d.idstr == "vfio-container"] == [0]
    new.platform.loop.close()


def test_container_goes_before_its_group(make) -> None:
    """The kernel takes a container's IOMMU away with its last group."""
    vmm = make()
    kinds = [type(device).__name__ for device in vmm.devices]
    assert kinds == ["PciHost", "Group", "Type1Container", "VfioPci"], "they end from the last on"


def test_container_whose_memory_cannot_be_locked(host: FakeHost) -> None:
    host.fail["map_dma"] = lambda iova: errno.ENOMEM if iova else 0
    vmm = FakeVmm(host)
    with pytest.raises(KernelError):
        Type1(vmm.fds, vmm.add_device, host, host).open(NAME, f"/{NAME}")
    assert all(not mappings for mappings in host.mappings.values())
    vmm.close()
    assert vmm.fds.entries() == []


def test_two_containers(make, host: FakeHost) -> None:
    host.incompatible = {27}
    vmm = make("type1", [NAME, OTHER])
    assert host.log.count("open_container") == 2
    vmm.prepare()
    new = vmm.successor("type1")
    assert not set(host.log) & FORBIDDEN
    assert host.log.count("update_vaddr") == 4
    assert None not in host_addresses(host)
    assert [d.instance_id for d in new.devices if d.idstr == "vfio-container"] == [0, 1]
    new.platform.loop.close()


def test_second_container_that_fails_leaves_nothing_open(host: FakeHost) -> None:
    host.incompatible = {27}
    seen = []
    host.fail["set_iommu"] = lambda: errno.EPERM if (seen.append(1), len(seen))[1] > 1 else 0
    vmm = Vmm(host, "type1", [NAME])
    with pytest.raises(CprError):
        Type1(vmm.fds, vmm.add_device, host, host).open(OTHER, f"/{OTHER}")
    assert ("vfio_group", 27) not in names_and_ids(vmm)
    vmm.close()
