"""virtio-net, virtio-rng and virtconsole over PCI, driven by the test."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from virtio_driver import (
    BAR_BASE,
    F_EVENT_IDX,
    F_VERSION_1,
    NEEDS_RESET,
    RAM_SIZE,
    Driver,
    VirtioPlatform,
)

from cpr.config import NetdevConfig
from cpr.constants import PAGE_SIZE
from cpr.devices.dma import DmaMappings
from cpr.devices.pci import PciHost
from cpr.devices.virtio.balloon import VirtioBalloon
from cpr.devices.virtio.net import VirtioNet, parse_mac
from cpr.devices.virtio.pci import VirtioPci
from cpr.devices.virtio.rng import VirtioRng
from cpr.devices.virtio.serial import VirtioSerial
from cpr.errors import CommandError, ConfigError, CprError
from cpr.state.fds import PreservedFds
from cpr.uapi import tap, vhost

HEADER = 12
MRG_RXBUF = 1 << 15
BUFFERS = 0x20000
MAC = bytes.fromhex("525400123456")


class Rig:
    """A platform with one device, running, and the driver of it."""

    inhibited = False

    def __init__(self, device: Any) -> None:
        self.platform = VirtioPlatform()
        self.bus = PciHost()
        self.bus.realize(self.platform)
        self.function = VirtioPci(device, self.bus)
        self.function.realize(self.platform)
        self.function.on_run()
        self.driver = Driver(self.platform)

    def close(self) -> None:
        self.function.unrealize()
        self.bus.unrealize()
        self.platform.close()


class NetRig(Rig):
    """A network card on one end of a pair of datagram sockets, in place of a tap."""

    def __init__(self, has_header: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wire, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire.settimeout(20)
        self.offloads: list[tuple] = []
        monkeypatch.setattr(tap, "query", lambda fd: ("tap0", has_header))
        monkeypatch.setattr(tap, "set_offload", lambda fd, *wanted: self.offloads.append(wanted))
        card = VirtioNet(NetdevConfig("n0", str(end.detach()), ""), PreservedFds(), MAC)
        card.open()
        super().__init__(card)
        self.has_header = has_header

    def start(self, features: int = 0) -> None:
        self.driver.start(F_VERSION_1 | features, (16, 16))

    def close(self) -> None:
        self.wire.close()
        super().close()


@pytest.fixture(params=[True, False], ids=["header", "no header"])
def net(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[NetRig]:
    rig = NetRig(request.param, monkeypatch)
    yield rig
    rig.close()


def frame_of(rig: NetRig, payload: bytes) -> bytes:
    return bytes(HEADER) + payload if rig.has_header else payload


def test_what_the_card_is(net: NetRig) -> None:
    assert net.driver.config(0, 4) == 0x10411AF4
    mac = bytes(net.driver.own(offset, 1) for offset in range(6))
    assert mac == MAC
    assert net.driver.own(6, 2) == 1
    assert bool(net.driver.offered() & 1) is net.has_header


def test_a_device_that_cannot_start_is_tried_again(
    net: NetRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often its driver resets it meanwhile: one message, and one try at a time."""
    tries: list[int] = []
    reports: list[str] = []
    start = VirtioNet.start

    def fails(card: VirtioNet) -> None:
        tries.append(1)
        if len(tries) < 15:
            raise CprError("there is no thread")
        start(card)

    monkeypatch.setattr(VirtioNet, "start", fails)
    monkeypatch.setattr("cpr.report.error_report", reports.append)
    for _ in range(10):
        net.start()
    assert len(tries) == 10
    net.platform.loop.iterate(0)
    net.platform.wait(lambda: len(tries) == 11)
    for _ in range(3):
        net.platform.loop.iterate(0)
    assert len(tries) == 11
    net.platform.wait(lambda: len(tries) == 15)
    assert [text.partition(":")[2] for text in reports] == [
        " there is no thread; it is tried again"
    ]
    ring = net.driver.queues[1]
    ring.add([(BUFFERS, HEADER, False), (BUFFERS + HEADER, 60, False)])
    ring.kick()
    assert len(net.wire.recv(2000)) == len(frame_of(net, bytes(60)))


def test_frames_to_the_wire(net: NetRig) -> None:
    net.start()
    driver, ring = net.driver, net.driver.queues[1]
    for number in range(40):  # more than there are descriptors
        payload = bytes([number]) * 60
        driver.write(BUFFERS, bytes(HEADER) + payload)
        head = ring.add([(BUFFERS, HEADER, False), (BUFFERS + HEADER, 60, False)])
        ring.kick()
        assert net.wire.recv(2000) == frame_of(net, payload)
        assert ring.wait_used() == (head, 0)


def test_frames_from_the_wire(net: NetRig) -> None:
    net.start()
    driver, ring = net.driver, net.driver.queues[0]
    net.wire.send(frame_of(net, b"early frame"))  # before there is a buffer
    for number in range(40):
        head = ring.add([(BUFFERS, 2048, True)])
        ring.kick()
        if number:
            net.wire.send(frame_of(net, bytes([number]) * 100))
        used, written = ring.wait_used()
        expected = bytes([number]) * 100 if number else b"early frame"
        assert (used, written) == (head, HEADER + len(expected))
        assert driver.read(BUFFERS, written)[HEADER:] == expected
        assert driver.read(BUFFERS + 10, 2) == b"\1\0"


@pytest.mark.parametrize("event_idx", [0, F_EVENT_IDX], ids=["flags", "event index"])
def test_a_frame_in_several_buffers(net: NetRig, event_idx: int) -> None:
    net.start(MRG_RXBUF | event_idx)
    driver, ring = net.driver, net.driver.queues[0]
    payload = os.urandom(1000)
    for number in range(2):
        ring.add([(BUFFERS + 300 * number, 300, True)])
    ring.kick()
    net.wire.send(frame_of(net, payload))
    net.platform.loop.iterate(50_000_000)
    assert ring.used_index == 0  # a frame comes as a whole
    if event_idx:  # the guest has to notify of the next buffer, whatever it has offered before
        net.platform.wait(lambda: driver.read(ring.used + 4 + 8 * ring.size, 2) == b"\2\0")
    for number in range(2, 5):
        ring.add([(BUFFERS + 300 * number, 300, True)])
    ring.kick()
    net.platform.wait(lambda: ring.used_index == 4)
    data = b"".join(driver.read(BUFFERS + 300 * number, ring.wait_used()[1]) for number in range(4))
    assert data[10:12] == b"\4\0"
    assert data[HEADER:] == payload


def test_a_frame_that_fits_no_buffer_is_dropped(net: NetRig) -> None:
    net.start()
    ring = net.driver.queues[0]
    head = ring.add([(BUFFERS, 100, True)])
    ring.kick()
    net.wire.send(frame_of(net, bytes(500)))
    net.wire.send(frame_of(net, b"small"))
    assert ring.wait_used() == (head, HEADER + 5)


def test_a_wire_that_is_full(net: NetRig) -> None:
    """Frames wait in the guest's queue, and go out in their order, each once."""
    net.start()
    driver, ring = net.driver, net.driver.queues[1]
    sent, received = 0, []
    driver.write(BUFFERS, bytes(HEADER))
    while sent < 2000:
        if (sent - ring.used_index) % 65536 < 8:
            place = BUFFERS + 0x100 + 16 * (sent % 8)
            driver.write(place, struct.pack("<I", sent))
            ring.add([(BUFFERS, HEADER, False), (place, 4, False)])
            ring.kick()
            sent += 1
        else:
            received.append(net.wire.recv(100))
    while len(received) < sent:
        received.append(net.wire.recv(100))
    assert received == [frame_of(net, struct.pack("<I", number)) for number in range(sent)]


def test_hostile_frames(net: NetRig, capfd: pytest.CaptureFixture) -> None:
    for index, pieces in (
        (1, [(BUFFERS, 5, False)]),
        (1, [(RAM_SIZE, 64, False)]),
        (0, [(RAM_SIZE - 10, 2048, True)]),
    ):
        net.start()
        ring = net.driver.queues[index]
        ring.add(pieces)
        ring.kick()
        net.wire.send(frame_of(net, bytes(60)))
        net.platform.wait(lambda: net.driver.status & NEEDS_RESET)
        assert f"virtio-net: queue {index}: " in capfd.readouterr().err


def test_offloads_are_what_the_driver_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = NetRig(True, monkeypatch)
    rig.start(1 << 1 | 1 << 7)
    assert rig.offloads[-1] == (True, True, False, False, False)
    rig.start()
    assert rig.offloads[-1] == (False, False, False, False, False)
    rig.close()


def test_a_stop_keeps_frames_on_the_wire(net: NetRig) -> None:
    net.start()
    driver, ring = net.driver, net.driver.queues[0]
    net.function.on_stop()
    head = ring.add([(BUFFERS, 2048, True)])
    net.wire.send(frame_of(net, b"while it stands still"))
    assert net.function.save()["virtio"]["queues"][0]["next"] == 0
    net.function.on_run()
    assert ring.wait_used()[0] == head
    assert driver.read(BUFFERS + HEADER, 21) == b"while it stands still"


@pytest.mark.parametrize("text", ["", "52:54:00:12:34", "52:54:00:12:34:xx", "525400123456", "1:2"])
def test_macs_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="doesn't take value"):
        parse_mac(text)


def test_macs() -> None:
    assert parse_mac("52:54:00:12:34:56") == parse_mac("52-54-00-12-34-56") == MAC
    with pytest.raises(ConfigError, match="first byte must be even"):
        parse_mac("53:54:00:12:34:56")


def test_bars_that_change_places_in_an_update(capfd: pytest.CaptureFixture) -> None:
    """What was loaded while the guest ran is where the next one belongs at the hand-over."""
    old, new = Rig(VirtioRng()), Rig(VirtioRng())
    seconds = []
    for rig in (old, new):
        seconds.append(VirtioPci(VirtioRng(), rig.bus))
        seconds[-1].realize(rig.platform)
    places = (BAR_BASE + 0x20000, BAR_BASE + 0x30000, BAR_BASE + 0x40000)
    for first, second in (places[:2], places[1:]):
        for slot, base in ((1, 0), (2, 0), (1, first), (2, second)):
            Driver(old.platform, slot, base)
        for source, target in ((old.function, new.function), tuple(seconds)):
            target.restore(source.save())
    for function in (new.function, seconds[1]):
        function.take_over()
    regions = [
        {(region.base, region.name) for region in rig.platform.bus.memory.regions}
        for rig in (old, new)
    ]
    assert regions[0] == regions[1]
    assert {base for base, _ in regions[1]} >= set(places[1:])
    assert "BAR" not in capfd.readouterr().err
    for rig, function in zip((old, new), seconds, strict=True):
        function.unrealize()
        rig.close()


def test_random_bytes() -> None:
    rig = Rig(VirtioRng())
    rig.driver.start(sizes=(8,))
    ring = rig.driver.queues[0]
    seen = set()
    for _ in range(20):
        ring.add([(BUFFERS, 64, True)])
        ring.kick()
        assert ring.wait_used()[1] == 64
        seen.add(rig.driver.read(BUFFERS, 64))
    assert len(seen) == 20
    rig.close()


def test_random_bytes_by_a_rate() -> None:
    rig = Rig(VirtioRng(max_bytes=100, period=20))
    rig.driver.start(sizes=(8,))
    ring = rig.driver.queues[0]
    for _ in range(2):
        ring.add([(BUFFERS, 80, True)])
    ring.kick()
    assert [ring.wait_used()[1] for _ in range(2)] == [80, 20]
    ring.add([(BUFFERS, 80, True)])
    ring.kick()
    assert ring.used_index == 2
    assert ring.wait_used()[1] == 80
    rig.close()


class FakeChardev:
    """Keeps what is written; `alone`: it was attached while no vCPU gets to the device."""

    def __init__(self, platform: VirtioPlatform) -> None:
        self.written = b""
        self._platform = platform

    def set_handlers(self, can_receive: Any, receive: Any, event: Any) -> None:
        self.can_receive, self.receive = can_receive, receive
        self.alone = self._platform.keeps_vcpus_away()

    def write(self, data: bytes) -> None:
        self.written += data

    def accept_input(self) -> None:
        pass


def test_console() -> None:
    console = VirtioSerial()
    console.take()
    rig = Rig(console)
    chardev = FakeChardev(rig.platform)
    rig.driver.start(sizes=(16, 16))
    receive, transmit = rig.driver.queues
    rig.driver.write(BUFFERS, b"before there is a chardev; after")
    transmit.add([(BUFFERS, 27, False)])
    transmit.kick()
    assert transmit.used_index == 0
    console.attach(chardev)
    assert chardev.alone
    assert chardev.written == b"before there is a chardev; "
    transmit.add([(BUFFERS + 27, 5, False)])
    transmit.kick()
    assert transmit.used_index == 2
    assert chardev.written.endswith(b"; after")
    assert chardev.can_receive() == 0
    receive.add([(BUFFERS, 10, True)])
    assert chardev.can_receive() == 10
    chardev.receive(b"typed")
    assert receive.wait_used() == (0, 5)
    assert rig.driver.read(BUFFERS, 5) == b"typed"
    rig.function.on_stop()
    receive.add([(BUFFERS, 10, True)])
    assert chardev.can_receive() == 0
    rig.close()


def test_a_console_without_a_chardev_drops() -> None:
    console = VirtioSerial()
    rig = Rig(console)
    rig.driver.start(sizes=(16, 16))
    transmit = rig.driver.queues[1]
    transmit.add([(BUFFERS, 100, False)])
    transmit.kick()
    assert transmit.wait_used() == (0, 0)
    transmit.add([(BUFFERS, 1 << 20, False)])
    transmit.kick()
    rig.platform.wait(lambda: rig.driver.status & NEEDS_RESET)
    rig.close()


@pytest.mark.parametrize("device", [VirtioRng, VirtioSerial])
@pytest.mark.parametrize("seed", range(3))
def test_registers_take_anything(device: Any, seed: int, capfd: pytest.CaptureFixture) -> None:
    """A guest that writes whatever it likes wherever it likes breaks nothing but its device."""
    generator = random.Random(seed)
    rig = Rig(device())
    rig.driver.start(sizes=(8,) * len(device.queue_sizes))
    bars = [rig.driver.msix_base, rig.driver.capabilities[1]]
    for _ in range(2000):
        size = generator.choice((1, 2, 4))
        value = generator.choice((0, 1, 4, 0xF, 0xFFFFFFFF, generator.getrandbits(32)))
        value &= (1 << 8 * size) - 1
        where = generator.randrange(8)
        offset = generator.randrange(0, 256, size)
        if where == 0:
            if not 0x10 <= offset < 0x28 and offset // 2 != 2:  # where the BARs are stays known
                rig.driver.config(offset, size, value)
            rig.driver.config(offset, size)
            continue
        place = generator.choice(bars) + generator.choice((0, 0x800, 0x1000, 0x2000, 0x3000))
        place += offset % 64
        if generator.randrange(2):
            rig.platform.bus.mmio_write(place, size, value)
        else:
            assert 0 <= rig.platform.bus.mmio_read(place, size) < 1 << 8 * size
        rig.platform.loop.iterate(0)
    rig.function.on_stop()
    state = rig.function.save()
    rig.function.vmstate.encode(state)
    rig.function.check(state)
    rig.function.restore(state)
    rig.function.reset()
    rig.function.on_run()
    rig.driver = Driver(rig.platform)
    rig.driver.start(sizes=(8,) * len(device.queue_sizes))
    assert rig.driver.status & 4
    capfd.readouterr()
    rig.close()


@pytest.fixture
def balloon() -> Iterator[Rig]:
    rig = Rig(VirtioBalloon(RAM_SIZE, lambda: rig.inhibited))
    rig.driver.start(F_VERSION_1, (16, 16))
    yield rig
    rig.close()


def test_pages_in_the_balloon_are_holes(balloon: Rig) -> None:
    driver = balloon.driver
    events: list[dict] = []
    balloon.platform.events.subscribe(events.append)
    device = balloon.function.balloon
    device.set_target(RAM_SIZE - 5 * PAGE_SIZE)
    assert driver.own(0, 4) == 5
    pages = [40, 39, 41, 700, 0x80000, 7]  # 0x80000 is ROM
    for page in pages:
        driver.write(page * PAGE_SIZE, b"old")
    driver.write(BUFFERS, struct.pack("<6I", *pages))
    fd = balloon.platform.ram.fd
    blocks = os.fstat(fd).st_blocks
    head = driver.queues[0].add([(BUFFERS, 24, False)])
    driver.queues[0].kick()
    assert driver.queues[0].take_used() == (head, 0)
    assert os.fstat(fd).st_blocks == blocks - 5 * PAGE_SIZE // 512
    contents = [driver.read(page * PAGE_SIZE, 3) for page in pages]
    assert contents == [b"old" if page == 0x80000 else bytes(3) for page in pages]
    balloon.platform.bus.mmio_write(driver.capabilities[4] + 4, 4, 5)
    assert [event["data"] for event in events] == [{"actual": RAM_SIZE - 5 * PAGE_SIZE}]
    assert device.actual == RAM_SIZE - 5 * PAGE_SIZE
    state = balloon.function.save()["device"]
    assert state == {"num_pages": 5, "actual": 5}


def test_a_guest_that_changes_its_balloon_all_the_time_causes_an_event_a_second(
    balloon: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict] = []
    platform, actual = balloon.platform, balloon.driver.capabilities[4] + 4
    platform.events.subscribe(events.append)
    later: list = []
    monkeypatch.setattr(platform.loop, "call_later", lambda delay, call: later.append(call))
    for pages in range(1, 1000):
        platform.bus.mmio_write(actual, 4, pages)
    assert [event["data"]["actual"] for event in events] == [RAM_SIZE - PAGE_SIZE]
    later.pop()()
    assert [event["data"]["actual"] for event in events[1:]] == [RAM_SIZE - 999 * PAGE_SIZE]
    later.pop()()
    assert len(events) == 2
    assert not later


def test_pages_that_a_device_may_have_stay(balloon: Rig) -> None:
    balloon.inhibited = True
    driver = balloon.driver
    driver.write(40 * PAGE_SIZE, b"kept")
    driver.write(BUFFERS, struct.pack("<I", 40))
    head = driver.queues[0].add([(BUFFERS, 4, False)])
    driver.queues[0].kick()
    assert driver.queues[0].take_used() == (head, 0)
    assert driver.read(40 * PAGE_SIZE, 4) == b"kept"


def test_a_card_whose_frames_the_kernel_carries_has_no_ram_mapped() -> None:
    """It keeps RAM from being copied, and nothing else; those who map it keep both."""
    assert DmaMappings.maps_ram and not VirtioPci.maps_ram


def test_balloons_of_hostile_guests(balloon: Rig, capfd: pytest.CaptureFixture) -> None:
    driver = balloon.driver
    driver.write(BUFFERS, b"\xff" * 4096 + b"12345")
    for size in (4096, 3, 5):  # all out of RAM; not whole numbers
        driver.queues[0].add([(BUFFERS, size, False)])
        driver.queues[0].kick()
    balloon.platform.bus.mmio_write(driver.capabilities[4] + 4, 4, 0xFFFFFFFF)
    assert balloon.function.balloon.actual == 0
    driver.queues[1].add([(BUFFERS, 8192, False)])
    driver.queues[1].kick()
    balloon.platform.wait(lambda: driver.status & NEEDS_RESET)
    assert "a buffer is longer than the device takes" in capfd.readouterr().err
    with pytest.raises(CommandError, match="Parameter 'value' expects a size"):
        balloon.function.balloon.set_target(0)
    with pytest.raises(ValueError, match="more pages in the balloon"):
        balloon.function.device.check({"num_pages": 5000, "actual": 0})


def test_vhost_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/nested/inside/test_vhost.py has what there is."""
    monkeypatch.setattr(tap, "query", lambda fd: ("tap0", True))
    wire, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = PreservedFds()
    monkeypatch.setattr(vhost, "DEVICE", "/dev/no-vhost")
    card = VirtioNet(NetdevConfig("n0", str(end.detach()), "", vhost=True), fds, MAC)
    with pytest.raises(ConfigError, match="tap: open vhost char device failed: No such file"):
        card.open()
    assert wire.recv(1) == b""  # the tap is closed
    assert fds.entries() == []
    wire.close()
