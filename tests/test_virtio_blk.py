"""virtio-blk over PCI: a driver of the test's does requests, good ones and hostile ones."""

from __future__ import annotations

import errno
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from virtio_driver import (
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    FEATURES_OK,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    RAM_SIZE,
    RESET,
    ROM_ADDRESS,
    Driver,
    FakeAccel,
    RingState,
    VirtioPlatform,
)

from cpr.config import DriveConfig
from cpr.devices.pci import PciHost
from cpr.devices.virtio.blk import VirtioBlk
from cpr.devices.virtio.pci import VirtioPci
from cpr.errors import ConfigError, KernelError
from cpr.state.fds import PreservedFds
from cpr.state.stream import StreamReader

SECTORS = 256
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
HEADER, STATUS, DATA = 0x1000, 0x1100, 0x2000
INTX_DISABLE = 1 << 10
F_FLUSH, F_CONFIG_WCE = 1 << 9, 1 << 11


OF_DEVICE = ("fds", "policies", "queues", "serial")  # options of Rig; the others are the drive's


class Rig:
    """A platform with one disk, running, and the driver of it."""

    def __init__(self, path: Path, platform: VirtioPlatform | None = None, **options: Any) -> None:
        drive = {key: options.pop(key) for key in list(options) if key not in OF_DEVICE}
        self.path = path
        self.fds = options.pop("fds", PreservedFds())
        self.platform = platform or VirtioPlatform()
        self.bus = PciHost()
        self.bus.realize(self.platform)
        drive.setdefault("interface", "none")
        self.blk = VirtioBlk(DriveConfig(str(path), id="d0", **drive), self.fds, False, **options)
        self.function = VirtioPci(self.blk, self.bus)
        try:
            self.function.realize(self.platform)
        except BaseException:
            self.bus.unrealize()
            raise
        self.function.on_run()
        self.driver = Driver(self.platform)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    @property
    def ring(self) -> RingState:
        return self.driver.queues[0]

    def go_over(self, **options: Any) -> Rig:
        """As in an update: a device that has taken this one's state, for the same driver."""
        encoded = self.function.vmstate.encode(self.function.save())
        self.function.unrealize()
        self.bus.unrealize()
        second = Rig(self.path, self.platform, **options)
        second.driver = self.driver
        second.function.on_stop()
        state = second.function.vmstate.decode(StreamReader(io.BytesIO(encoded).read), 1)
        second.function.check(state)
        second.function.restore(state)
        second.function.take_over()
        return second

    def submit(self, kind: int, sector: int, size: int, ring: RingState | None = None) -> int:
        """Offers a request whose buffer of `size` bytes is at DATA."""
        ring = ring or self.ring
        self.driver.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
        self.driver.write(STATUS, b"\xff")
        writes = kind in (IN, GET_ID)
        data = [(DATA, size, writes)] if size else []
        return ring.add([(HEADER, 16, False), *data, (STATUS, 1, True)])

    def do(self, kind: int, sector: int = 0, size: int = 0) -> int:
        """Does one request and returns its status."""
        head = self.submit(kind, sector, size)
        self.ring.kick()
        assert self.ring.wait_used()[0] == head
        return self.driver.read(STATUS, 1)[0]

    def stop(self) -> None:
        self.function.on_stop()

    def close(self) -> None:
        self.function.unrealize()
        self.bus.unrealize()
        assert self.platform.bus.memory.regions == []
        self.platform.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS)))
    return path


@pytest.fixture
def rig(image: Path) -> Iterator[Rig]:
    rig = Rig(image, serial="CPR-0001")
    rig.driver.start()
    yield rig
    rig.close()


def sector(number: int) -> bytes:
    return struct.pack("<Q", number) * 64


def test_what_the_device_is(rig: Rig) -> None:
    assert rig.config(0, 4) == 0x10421AF4
    assert rig.config(8, 4) == 0x01000001
    assert rig.own(0, 4) | rig.own(4, 4) << 32 == SECTORS
    assert rig.own(12, 4) == 254  # seg_max
    assert rig.status == 1 | 2 | 4 | 8
    assert rig.offered() & F_VERSION_1
    assert rig.common(18, 2) == 1


def test_reads_and_writes(rig: Rig) -> None:
    assert rig.do(IN, 7, 1024) == OK
    assert rig.read(DATA, 1024) == sector(7) + sector(8)
    rig.write(DATA, b"written!" * 128)
    assert rig.do(OUT, 9, 1024) == OK
    assert rig.do(FLUSH) == OK
    assert rig.path.read_bytes()[9 * 512 : 11 * 512] == b"written!" * 128
    assert rig.path.stat().st_size == SECTORS * 512
    assert rig.do(GET_ID, 0, 20) == OK
    assert rig.read(DATA, 20) == b"CPR-0001".ljust(20, b"\0")


def test_a_buffer_over_two_sections_of_ram(rig: Rig) -> None:
    middle = RAM_SIZE // 2 - 100
    rig.driver.write(HEADER, struct.pack("<IIQ", IN, 0, 3))
    rig.ring.add([(HEADER, 16, False), (middle, 512, True), (STATUS, 1, True)])
    rig.ring.kick()
    assert rig.ring.wait_used()[1] == 513
    assert rig.read(middle, 512) == sector(3)


def test_header_and_data_in_pieces(rig: Rig) -> None:
    rig.write(HEADER, struct.pack("<IIQ", OUT, 0, 4))
    rig.write(DATA, sector(99))
    pieces = [(HEADER + i, 1, False) for i in range(10)]
    pieces += [(HEADER + 10, 6 + 0, False), (DATA, 300, False), (DATA + 300, 212, False)]
    rig.ring.add([*pieces, (STATUS, 1, True)])
    rig.ring.kick()
    rig.ring.wait_used()
    assert rig.read(STATUS, 1) == b"\0"
    assert rig.path.read_bytes()[4 * 512 : 5 * 512] == sector(99)


@pytest.mark.parametrize(
    ("kind", "first", "size"),
    [(IN, SECTORS, 512), (IN, SECTORS - 1, 1024), (OUT, 1 << 60, 512), (IN, 0, 100), (OUT, 0, 511)],
)
def test_out_of_range(rig: Rig, kind: int, first: int, size: int) -> None:
    before = rig.path.read_bytes()
    assert rig.do(kind, first, size) == IOERR
    assert rig.path.read_bytes() == before


def test_unknown_request(rig: Rig) -> None:
    assert rig.do(77) == UNSUPP
    assert rig.do(IN, 1, 512) == OK


@pytest.mark.parametrize("unmap", [0, 1])
def test_write_zeroes(rig: Rig, unmap: int) -> None:
    rig.write(DATA, struct.pack("<QII", 10, 2, unmap))
    assert rig.do(WRITE_ZEROES, 0, 16) == OK
    data = rig.path.read_bytes()
    assert data[10 * 512 : 12 * 512] == bytes(1024)
    assert data[9 * 512 : 10 * 512] == sector(9)
    assert data[12 * 512 : 13 * 512] == sector(12)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((SECTORS - 1, 2, 0), IOERR),
        ((0, 0x400000, 0), IOERR),
        ((0, 1, 2), UNSUPP),
        (((1 << 63), 1, 0), IOERR),
    ],
)
def test_bad_ranges_to_zero(rig: Rig, fields: tuple, status: int) -> None:
    rig.write(DATA, struct.pack("<QII", *fields))
    assert rig.do(WRITE_ZEROES, 0, 16) == status


def test_discard_only_where_it_may(image: Path) -> None:
    for discards, blocks in ((False, True), (True, False)):
        rig = Rig(image, discards=discards)
        rig.start()
        rig.write(DATA, struct.pack("<QII", 0, 128, 0))
        assert rig.do(DISCARD, 0, 16) == OK
        assert any(image.read_bytes()[: 128 * 512]) is blocks
        rig.close()


def test_readonly(image: Path) -> None:
    image.chmod(0o444)
    rig = Rig(image, readonly=True)
    assert rig.offered() & 1 << 5
    rig.start()
    assert rig.do(IN, 1, 512) == OK
    assert rig.do(OUT, 1, 512) == IOERR
    assert rig.do(DISCARD, 0, 16) == IOERR
    assert rig.do(FLUSH) == OK
    rig.close()


def test_a_file_that_is_cut_off(rig: Rig) -> None:
    os.truncate(rig.path, 10 * 512 + 100)
    assert rig.do(IN, 10, 1024) == OK
    assert rig.read(DATA, 1024) == sector(10)[:100] + bytes(924)


def test_last_sector_in_part(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 700)
    rig = Rig(path)
    rig.start()
    assert rig.own(0, 4) == 2
    assert rig.do(IN, 1, 512) == OK
    assert rig.read(DATA, 512) == b"x" * 188 + bytes(324)
    rig.close()


def test_indirect(image: Path) -> None:
    rig = Rig(image)
    rig.start(F_VERSION_1 | F_INDIRECT)
    rig.write(HEADER, struct.pack("<IIQ", IN, 0, 5))
    table = struct.pack("<QIHH", HEADER, 16, NEXT, 2)
    table += struct.pack("<QIHH", STATUS, 1, 2, 0)
    table += struct.pack("<QIHH", DATA, 512, NEXT | 2, 1)
    rig.write(0x3000, table)
    rig.ring.put(0, (0x3000, len(table), False), INDIRECT)
    rig.ring.offer(0)
    rig.ring.kick()
    assert rig.ring.wait_used() == (0, 513)
    assert rig.read(DATA, 512) == sector(5)
    rig.close()


def hostile(rig: Rig, shape: str) -> None:
    ring = rig.ring
    good = (HEADER, 16, False)
    if shape == "loop":
        ring.put(0, good, NEXT, 1)
        ring.put(1, good, NEXT, 0)
    elif shape == "self":
        ring.put(0, good, NEXT, 0)
    elif shape == "next":
        ring.put(0, good, NEXT, 500)
    elif shape == "address":
        ring.put(0, (RAM_SIZE, 16, False))
    elif shape == "end":
        ring.put(0, (RAM_SIZE - 8, 16, False))
    elif shape == "wrap":
        ring.put(0, ((1 << 64) - 8, 16, False))
    elif shape == "rom":
        ring.put(0, good, NEXT, 1)
        ring.put(1, (ROM_ADDRESS, 513, True))
    elif shape == "empty":
        ring.put(0, (HEADER, 0, False))
    elif shape == "order":
        ring.put(0, (STATUS, 1, True), NEXT, 1)
        ring.put(1, good)
    elif shape == "no status":
        ring.put(0, good)
    elif shape == "short":
        ring.put(0, (HEADER, 15, False), NEXT, 1)
        ring.put(1, (STATUS, 1, True))
    elif shape == "not negotiated":
        ring.put(0, (0x3000, 16, False), INDIRECT)
    if shape == "head":
        ring.offer(999)
    elif shape == "jump":
        ring.next_available += 1000
        ring.offer(0)
    else:
        ring.offer(0)


SHAPES = "loop,self,next,address,end,wrap,rom,empty,order,no status,short,not negotiated,head,jump"


@pytest.mark.parametrize("shape", SHAPES.split(","))
def test_hostile_chains(rig: Rig, shape: str, capfd) -> None:
    """The device waits for a reset, says why, and works again afterwards."""
    hostile(rig, shape)
    rig.ring.kick()
    rig.platform.wait(lambda: rig.status & NEEDS_RESET)
    assert "virtio-blk: queue 0: " in capfd.readouterr().err
    rig.platform.wait(lambda: rig.platform.messages)
    assert rig.platform.messages[-1][1] == 0x40  # the configuration's vector
    assert rig.ring.used_index == 0
    rig.ring.kick()
    rig.start()
    assert not rig.status & NEEDS_RESET
    assert rig.do(IN, 1, 512) == OK


@pytest.mark.parametrize(
    ("table", "length"),
    [(RAM_SIZE, 32), (0x3000, 24), (0x3000, 0), (RAM_SIZE - 16, 32), (0x3000, 16 << 12)],
)
def test_hostile_indirect_tables(image: Path, table: int, length: int) -> None:
    rig = Rig(image)
    rig.start(F_VERSION_1 | F_INDIRECT)
    # A nested table, and a chain that never ends, are in the one that is in RAM.
    rig.write(0x3000, struct.pack("<QIHH", HEADER, 1, NEXT, 0) * 1024)
    rig.ring.put(0, (table, length, False), INDIRECT)
    rig.ring.offer(0)
    rig.ring.kick()
    rig.platform.wait(lambda: rig.status & NEEDS_RESET)
    rig.close()


@pytest.mark.parametrize("place", ["descriptors", "available", "used"])
def test_rings_that_are_not_in_ram(rig: Rig, place: str) -> None:
    rig.negotiate(F_VERSION_1)
    ring = RingState(rig.driver, 0, 1 << 20, 16)
    setattr(ring, place, RAM_SIZE - 16)
    rig.driver.place_queue(ring)
    rig.common(20, 1, rig.status | DRIVER_OK)
    assert rig.status & NEEDS_RESET
    rig.start()
    assert rig.do(IN, 1, 512) == OK


def test_features_that_were_not_offered(rig: Rig) -> None:
    rig.negotiate(F_VERSION_1 | 1 << 40)
    assert not rig.status & FEATURES_OK
    rig.negotiate(0)
    assert not rig.status & FEATURES_OK
    rig.common(20, 1, rig.status | DRIVER_OK)
    assert not rig.status & DRIVER_OK


def test_event_index(image: Path) -> None:
    """No interrupt before the used index that the driver has named."""
    rig = Rig(image)
    rig.start(F_VERSION_1 | F_EVENT_IDX)
    event = rig.ring.available + 4 + 2 * rig.ring.size
    rig.write(event, struct.pack("<H", 2))
    rig.do(IN, 1, 512)
    rig.do(IN, 2, 512)
    rig.platform.loop.iterate(0)
    assert rig.platform.messages == []
    rig.do(IN, 3, 512)
    rig.platform.wait(lambda: rig.platform.messages)
    rig.close()


def test_no_interrupt_where_none_is_wanted(rig: Rig) -> None:
    rig.write(rig.ring.available, struct.pack("<H", 1))
    rig.do(IN, 1, 512)
    rig.platform.loop.iterate(0)
    assert rig.platform.messages == []


def test_masked_vector_is_pending(rig: Rig) -> None:
    rig.set_vector(1, 0x41, masked=True)
    rig.do(IN, 1, 512)
    pba = rig.msix_base + 0x800
    rig.platform.wait(lambda: rig.platform.bus.mmio_read(pba, 4) == 2)
    assert rig.platform.messages == []
    rig.set_vector(1, 0x55)
    assert rig.platform.messages == [(0xFEE00000, 0x55)]
    assert rig.platform.bus.mmio_read(pba, 4) == 0


def test_intx(image: Path) -> None:
    rig = Rig(image)
    rig.start(msix=False)
    rig.do(IN, 1, 512)
    rig.platform.wait(lambda: rig.platform.lines.get(10))
    isr = rig.capabilities[3]
    assert rig.platform.bus.mmio_read(isr, 1) == 1
    assert rig.platform.lines[10] is False
    assert rig.platform.bus.mmio_read(isr, 1) == 0
    rig.close()


def test_intx_that_is_disabled(image: Path) -> None:
    """PCI Local Bus spec. 3.0, 6.2.2: the function holds no line up, and goes on with it later."""
    rig = Rig(image)
    rig.start(msix=False)
    rig.do(IN, 1, 512)
    rig.platform.wait(lambda: rig.platform.lines.get(10))
    rig.config(4, 2, 6 | INTX_DISABLE)
    assert rig.platform.lines[10] is False
    rig.config(4, 2, 6)
    assert rig.platform.lines[10] is True
    assert rig.platform.bus.mmio_read(rig.capabilities[3], 1) == 1
    assert rig.platform.lines[10] is False
    rig.close()


def test_several_queues(image: Path) -> None:
    rig = Rig(image, queues=4)
    assert rig.offered() & 1 << 12
    assert rig.common(18, 2) == 4
    rig.start(F_VERSION_1 | 1 << 12, (16, 8, 32, 64))
    for number, ring in enumerate(rig.driver.queues):
        rig.submit(IN, number, 512, ring)
        ring.kick()
        ring.wait_used()
        assert rig.read(DATA, 512) == sector(number)
    rig.platform.wait(lambda: len(rig.platform.messages) == 4)
    assert [data for _, data in rig.platform.messages] == [0x41, 0x42, 0x43, 0x44]
    rig.close()


def test_queues_for_which_there_is_no_ioeventfd(image: Path) -> None:
    """Their notifications come by the registers."""
    listened: dict[tuple[int, int], int] = {}

    class FullAccel(FakeAccel):
        ioeventfds = True

        def add_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
            if len(listened) == 2:
                raise KernelError("KVM_IOEVENTFD", errno.ENOSPC)
            listened[address, size] = eventfd

        def remove_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
            assert listened.pop((address, size)) == eventfd

    rig = Rig(image, VirtioPlatform(FullAccel()), queues=4)
    rig.start(F_VERSION_1 | 1 << 12, (8,) * 4)
    assert len(listened) == 2
    ring = rig.driver.queues[3]
    rig.submit(IN, 5, 512, ring)
    ring.kick()
    ring.wait_used()
    assert rig.read(DATA, 512) == sector(5)
    rig.config(4, 2, 0)
    assert not listened
    rig.close()


def test_vectors_that_kvm_refuses_go_through_the_main_loop(image: Path, capfd) -> None:
    class Refusing(FakeAccel):
        has_irqfds = True

        def add_messages(self, messages: list) -> list[int]:
            return [24]

        def set_message(self, gsi: int, address: int, data: int) -> None:
            pass

        def remove_message(self, gsi: int) -> None:
            pass

        def add_irqfd(self, gsi: int, eventfd: int) -> None:
            raise KernelError("KVM_IRQFD", errno.ENOMEM)

    rig = Rig(image, VirtioPlatform(Refusing()))
    rig.start()
    assert rig.do(IN, 1, 512) == OK
    rig.platform.wait(lambda: len(rig.platform.messages) == 1)
    rig.function.on_stop()
    rig.function.cpr_prepare("cpr-exec")
    rig.function.cpr_rollback()
    rig.function.on_run()
    assert rig.do(IN, 1, 512) == OK
    rig.platform.wait(lambda: len(rig.platform.messages) == 2)
    assert "goes through the VMM: KVM_IRQFD: " in capfd.readouterr().err
    rig.close()


def test_the_window_in_configuration_space(rig: Rig) -> None:
    """VIRTIO_PCI_CAP_PCI_CFG reaches the registers without a BAR."""
    rig.config(0x88, 1, 4)
    rig.config(0x8C, 4, 0x2000)
    rig.config(0x90, 4, 4)
    assert rig.config(0x94, 4) == SECTORS
    rig.config(0x88, 1, 5)
    assert rig.config(0x94, 4) == 0


def test_a_guest_that_resets_with_requests_under_way(rig: Rig) -> None:
    for _ in range(8):
        rig.ring.add([(HEADER, 16, False), (STATUS, 1, True)])
    rig.ring.kick()
    rig.common(20, 1, RESET)
    assert rig.status == 0
    rig.start()
    assert rig.do(IN, 1, 512) == OK


def batch(rig: Rig, count: int, size: int) -> None:
    """Offers writes of different contents to different sectors, each with its own memory."""
    for number in range(count):
        place = 0x20000 + number * 0x2000
        rig.write(place, struct.pack("<IIQ", OUT, 0, number * size // 512))
        rig.write(place + 0x100, b"\xff")
        rig.write(place + 0x200, bytes([number + 1]) * size)
        rig.ring.add([(place, 16, False), (place + 0x200, size, False), (place + 0x100, 1, True)])


def test_stop_and_go_on(tmp_path: Path) -> None:
    """Each request is done once, whether it was taken before the stop or not."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * 512))
    rig = Rig(path)
    rig.start(sizes=(64,))
    batch(rig, 16, 2048)
    rig.ring.kick()
    rig.function.on_stop()
    done = rig.ring.used_index
    data = path.read_bytes()
    state = rig.function.save()
    queue = state["virtio"]["queues"][0]
    assert queue["next"] == queue["used"] == done
    rig.function.on_run()  # nobody kicks again
    rig.platform.wait(lambda: rig.ring.used_index == 16)
    heads = sorted(rig.ring.wait_used()[0] for _ in range(16))
    assert heads == [3 * number for number in range(16)]
    for number in range(16):
        assert path.read_bytes()[number * 2048 : (number + 1) * 2048] == bytes([number + 1]) * 2048
    assert len(data) == SECTORS * 512
    rig.close()


def test_goes_over_to_another_device(image: Path) -> None:
    """What an update carries: the second device goes on where the first one was."""
    rig = Rig(image)
    rig.start(F_VERSION_1 | F_CONFIG_WCE)
    rig.platform.bus.mmio_write(rig.capabilities[4] + 32, 1, 0)  # write through
    rig.do(IN, 1, 512)
    rig.set_vector(1, 0x41, masked=True)
    head = rig.submit(IN, 2, 512)
    rig.function.on_stop()  # nobody has said that there is a request
    assert rig.ring.used_index == 1
    second = rig.go_over()
    platform, driver = second.platform, second.driver
    assert second.own(32, 1) == 0
    second.function.on_run()
    assert driver.queues[0].wait_used()[0] == head
    assert driver.read(DATA, 512) == sector(2)
    pba = driver.msix_base + 0x800
    platform.wait(lambda: platform.bus.mmio_read(pba, 4) & 2)
    second.close()


def test_states_that_cannot_be(rig: Rig) -> None:
    rig.stop()
    good = rig.function.save()
    for change in (
        {"queue_count": 2},
        {"guest_features": 1 << 50},
        {"queues": [{**good["virtio"]["queues"][0], "size": 3}]},
    ):
        with pytest.raises(ValueError):
            rig.function.check({**good, "virtio": {**good["virtio"], **change}})
    kept = {"write_cache": 1, "kept_count": 1, "kept": [{"queue": 3, "head": 0}]}
    with pytest.raises(ValueError):
        rig.function.check({**good, "device": kept})


def test_no_space(image: Path, tmp_path: Path) -> None:
    """The VM stops; when it goes on, the write is done."""
    rig = Rig(image)
    events: list[dict] = []
    rig.platform.events.subscribe(lambda event: events.append(event))
    rig.start()
    full = os.open("/dev/full", os.O_RDWR)
    saved = os.dup(rig.blk._image.fd)
    os.dup2(full, rig.blk._image.fd)
    rig.write(DATA, b"n" * 512)
    head = rig.submit(OUT, 3, 512)
    rig.ring.kick()
    rig.platform.wait(lambda: rig.platform.stops)
    assert rig.platform.stops == ["io-error"]
    assert rig.ring.used_index == 0
    rig.function.on_stop()
    state = rig.function.save()["device"]
    assert state["kept"] == [{"queue": 0, "head": head}]
    os.dup2(saved, rig.blk._image.fd)
    rig.function.on_run()
    assert rig.ring.wait_used()[0] == head
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"n" * 512
    os.close(full)
    os.close(saved)
    rig.close()


def test_who_stops_a_disk_does_not_wait_for_zeroes(tmp_path: Path) -> None:
    """Of a file that knows no ZERO_RANGE, which would take a write for each 64 KiB."""
    path = tmp_path / "large.img"
    path.touch()
    os.truncate(path, 0x3FFFFF * 512)
    rig = Rig(path)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, rig.blk._image.fd)
    os.close(null)
    rig.start(F_VERSION_1 | F_FLUSH)
    for number in range(1, 101):  # the last write may be the one under way when the stop comes
        rig.write(DATA, struct.pack("<QII", 0, 0x3FFFFF, 0))
        head = rig.submit(WRITE_ZEROES, 0, 16)
        rig.ring.kick()
        while rig.function.queues[0].next() != number:  # until it is taken
            rig.platform.loop.iterate(0)
        rig.function.on_stop()
        kept = rig.function.save()["device"]["kept"]
        if kept:
            break
        rig.function.on_run()
        rig.ring.wait_used()
    assert kept == [{"queue": 0, "head": head}]
    assert rig.ring.take_used() is None
    rig.function.on_run()
    assert rig.ring.wait_used() == (head, 1)
    assert rig.read(STATUS, 1)[0] == OK
    rig.function.on_stop()
    assert rig.function.save()["device"]["kept"] == []
    rig.close()


def test_locks_keep_others_away(image: Path) -> None:
    rig = Rig(image)
    with pytest.raises(ConfigError, match='Failed to get "write" lock\nIs another process using'):
        Rig(image)
    with pytest.raises(ConfigError, match='Failed to get shared "write" lock'):
        Rig(image, readonly=True)
    free = Rig(image, locking=False)
    free.close()
    rig.function.cpr_prepare("normal")  # the target of a migration opens it
    other = Rig(image)
    other.close()
    rig.function.cpr_rollback()
    with pytest.raises(ConfigError):
        Rig(image)
    rig.close()
    Rig(image).close()


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Could not open '.*/none': No such file or directory"):
        Rig(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"Could not open '.*': Is a directory"):
        Rig(tmp_path)
    with pytest.raises(ConfigError, match="neither a file nor a disk"):
        Rig(Path("/dev/zero"))


@pytest.mark.parametrize("options", [{"queues": 0}, {"queues": 65}, {"queue_size": 100}])
def test_options_that_cannot_be(image: Path, options: dict) -> None:
    with pytest.raises(ConfigError):
        VirtioBlk(DriveConfig(str(image)), PreservedFds(), False, **options)
