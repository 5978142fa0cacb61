"""virtio-net with vhost=on, on the kernel's /dev/vhost-net: a driver of the test's, in-process.

The frames are those of a packet socket on the tap.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_virtio_devices import BUFFERS, HEADER, MAC, Rig
from virtio_driver import F_EVENT_IDX, F_VERSION_1, NEEDS_RESET, RAM_SIZE
from waiting import wait_for

from cpr.config import NetdevConfig
from cpr.devices.virtio.net import VirtioNet
from cpr.errors import KernelError
from cpr.state.fds import PreservedFds
from cpr.uapi import vhost

NAME = "vhost0"
KIND = b"\x88\xb5"  # for experiments (IEEE 802)
SECONDS = 30
UPDATE_SECONDS = 200  # the host may be loaded


class VhostRig(Rig):
    """A card on a new tap; `wire` has what is on that."""

    def __init__(self) -> None:
        self.fds = PreservedFds()
        card = VirtioNet(NetdevConfig("n0", None, NAME, vhost=True), self.fds, MAC)
        card.open()
        super().__init__(card)
        own_frames = Path(f"/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6")
        if own_frames.exists():
            own_frames.write_text("1")
        subprocess.run(["ip", "link", "set", NAME, "up"], check=True, timeout=SECONDS)
        kind = int.from_bytes(KIND, "big")
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
        self.wire.bind((NAME, kind))
        self.wire.settimeout(SECONDS)

    def start(self) -> None:
        self.driver.start(F_VERSION_1 | F_EVENT_IDX, (16, 16))

    def send(self, number: int) -> None:
        """A frame of the guest's."""
        ring = self.driver.queues[1]
        self.driver.write(BUFFERS, bytes(HEADER) + frame(number))
        head = ring.add([(BUFFERS, HEADER + 60, False)])
        ring.kick()
        assert ring.wait_used()[0] == head

    def offer(self, number: int) -> int:
        """A buffer of the guest's for a frame."""
        head = self.driver.queues[0].add([(BUFFERS + 0x1000 * (number + 1), 2048, True)])
        self.driver.queues[0].kick()
        return head

    def received(self, number: int) -> bytes:
        _, written = self.driver.queues[0].wait_used()
        return self.driver.read(BUFFERS + 0x1000 * (number + 1), written)[HEADER:]

    def close(self) -> None:
        self.wire.close()
        super().close()


def frame(number: int) -> bytes:
    return (b"\xff" * 6 + MAC + KIND + number.to_bytes(4, "big")).ljust(60, b"\0")


@pytest.fixture(autouse=True)
def there_is_vhost() -> None:
    if not Path(vhost.DEVICE).exists():
        pytest.skip(f"this kernel has no {vhost.DEVICE}")


@pytest.fixture
def rig() -> Iterator[VhostRig]:
    rig = VhostRig()
    rig.start()
    yield rig
    rig.close()


def test_frames_both_ways(rig: VhostRig) -> None:
    for number in range(40):
        rig.send(number)
        assert rig.wire.recv(2000) == frame(number)
        rig.offer(number % 8)
        rig.wire.send(frame(number))
        assert rig.received(number % 8) == frame(number)


def test_a_stop_loses_and_repeats_nothing(rig: VhostRig) -> None:
    """Each time with the positions of the rings, which go over in an update."""
    for number in range(5):
        rig.send(number)
        rig.function.on_stop()
        saved = rig.function.save()["virtio"]["queues"]
        assert [(queue["next"], queue["used"]) for queue in saved] == [
            (number, number),
            (number + 1, number + 1),
        ]
        rig.wire.send(frame(number))
        rig.offer(0)
        rig.function.on_run()
        assert rig.received(0) == frame(number)
    assert [rig.wire.recv(2000) for _ in range(5)] == [frame(number) for number in range(5)]


def owner_of_a_child(fd: int) -> int:
    """The exit status of a child that becomes the owner, and gives that up."""
    pid = os.fork()
    if pid == 0:
        try:
            vhost.take(fd, 0, [], [], -1)
            vhost.give(fd, 0)
            os._exit(0)
        except KernelError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_it_has_an_owner_only_while_it_runs(rig: VhostRig) -> None:
    fd = rig.fds.open("netdev:n0:vhost", 0, lambda: -1)
    assert owner_of_a_child(fd) == 1
    rig.function.on_stop()
    assert owner_of_a_child(fd) == 0
    rig.function.on_run()
    rig.send(1)
    rig.function.park()
    assert owner_of_a_child(fd) == 0
    rig.function.unpark()
    rig.send(2)


def test_another_owner(rig: VhostRig, capfd: pytest.CaptureFixture) -> None:
    rig.function.on_stop()
    fd = rig.fds.open("netdev:n0:vhost", 0, lambda: -1)
    vhost.take(fd, 0, [], [], -1)
    rig.function.on_run()
    said = capfd.readouterr().err
    assert "VHOST_SET_OWNER on /dev/vhost-net" in said and "it is tried again" in said
    assert not rig.driver.status & NEEDS_RESET
    vhost.give(fd, 0)
    rig.platform.wait(lambda: rig.function._started)
    rig.send(1)


def test_a_hostile_chain(rig: VhostRig, capfd: pytest.CaptureFixture) -> None:
    ring = rig.driver.queues[1]
    ring.add([(RAM_SIZE + 0x100000, 64, False)])
    ring.kick()
    rig.platform.wait(lambda: rig.driver.status & NEEDS_RESET)
    assert "virtio-net: vhost has met" in capfd.readouterr().err
    rig.start()
    rig.send(1)


def test_its_descriptor_goes_over_updates(start) -> None:
    """Early, late, and with a program that fails; tests of Linux have frames on the way."""
    netdev = f"tap,id=n0,ifname={NAME},script=no,downscript=no,vhost=on"
    vm = start(
        *("examples/heartbeat.cfg", "-monitor", "none", "-accel", "kvm"),
        *("-global", f"migration.x-cpr-exec-timeout={UPDATE_SECONDS}000"),
        *("-netdev", netdev, "-device", "virtio-net-pci,netdev=n0"),
        timeout=UPDATE_SECONDS,
    )

    def kept() -> list[tuple[int, str]]:
        files = {fd: name for fd, name in vm.descriptors().items() if name.startswith("/dev/")}
        found = [os.stat(f"/proc/{vm.pid}/fd/{fd}").st_ino for fd in files]
        names = [name for name in files.values() if name in (vhost.DEVICE, "/dev/net/tun")]
        assert sorted(names) == ["/dev/net/tun", vhost.DEVICE]
        return sorted(zip(found, files.values(), strict=True))

    before = kept()
    for overlap in ("on", "off"):
        vm.qmp.command("migrate-set-parameters", {"x-cpr-exec-overlap": overlap})
        vm.update()
        assert kept() == before
    vm.qmp.command("cpr-exec", command=["/bin/false"])
    wait_for(lambda: vm.ask("query-migrate").get("status") == "failed", "the update to fail")
    vm.follow()
    assert kept() == before
    assert vm.ask("query-status")["status"] == "running"
