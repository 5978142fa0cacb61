"""A disk on virtio through updates: a guest with many requests under way checks each of them.

The guest (tests/nested/guests/virtio-blk.c) stands still for ever if a request or an interrupt is
lost or comes twice.
"""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.vm import VMM, Vm
from waiting import is_listening, wait_for

ROOT = Path(__file__).resolve().parent
GUESTS = ROOT / "nested" / "guests"
BLOCKS, BATCH, BLOCK_SIZE = 256, 16, 4096
MIB = 1 << 20


class Guest:
    """The VM of the guest, and what it says in its mailbox."""

    def __init__(self, accel: str, disk: Path, *options: str) -> None:
        subprocess.run(["make", "-s", "-C", str(GUESTS)], check=True)
        image = GUESTS / "build" / "virtio-blk"
        lines = image.with_suffix(".sym").read_text().splitlines()
        self.symbols = {name: int(address, 16) for address, name in map(str.split, lines)}
        self.disk = disk
        self.vm = Vm(
            *("-accel", accel, "-nodefaults", "-m", "16M"),
            *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-kernel", f"{image}.elf"),
            *options,
        )

    def get(self, name: str) -> int:
        return self.vm.u32(self.symbols[name])

    def wait_rounds(self, more: int = 2) -> None:
        wanted = self.get("rounds") + more

        def arrived() -> bool:
            assert not self.get("failed"), f"check in line {self.get('failed')} of the guest"
            return self.get("rounds") >= wanted

        wait_for(arrived, "rounds of the guest", 60)

    def update(self, early: bool) -> None:
        overlap = "on" if early else "off"
        self.vm.qmp.command("migrate-set-parameters", {"x-cpr-exec-overlap": overlap})
        self.vm.update()

    def check_disk(self) -> None:
        """Stops the guest between two rounds, and looks at what it has written."""
        self.vm.write_u32(self.symbols["hold"], 1)
        wait_for(lambda: self.get("held"), "the guest to hold", 60)
        rounds, data = self.get("rounds"), self.disk.read_bytes()
        assert len(data) == MIB
        for last in range(max(1, rounds - BLOCKS // BATCH + 1), rounds + 1):
            for block in range(last * BATCH % BLOCKS, last * BATCH % BLOCKS + BATCH):
                expected = struct.pack("<I", last * BLOCKS + block) * (BLOCK_SIZE // 4)
                assert data[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] == expected
        self.vm.write_u32(self.symbols["hold"], 0)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    with open(path, "r+b") as file:
        file.truncate(MIB)
    return path


@pytest.fixture
def guest(accel: str, disk: Path) -> Iterator[Guest]:
    guest = Guest(accel, disk, "-drive", f"file={disk},format=raw,if=virtio")
    yield guest
    guest.vm.close()


def test_requests_go_over_updates(guest: Guest) -> None:
    guest.wait_rounds()
    for early in (True, False, True, False):
        guest.update(early)
        guest.wait_rounds()
    guest.check_disk()
    assert guest.get("interrupts") >= 2 * guest.get("rounds")
    assert guest.vm.complaints == ""


def test_requests_go_on_after_updates_that_fail(guest: Guest) -> None:
    guest.wait_rounds()
    for overlap in ("on", "off"):
        guest.vm.qmp.command("migrate-set-parameters", {"x-cpr-exec-overlap": overlap})
        guest.vm.qmp.command("cpr-exec", command=["/bin/false"])
        wait_for(
            lambda: guest.vm.ask("query-migrate").get("status") == "failed", "the update to fail"
        )
        guest.vm.follow()
        guest.wait_rounds()
        assert guest.vm.ask("query-status")["status"] == "running"
    guest.check_disk()


def test_stop_and_cont(guest: Guest) -> None:
    guest.wait_rounds()
    for _ in range(2):
        guest.vm.qmp.command("stop")
        rounds = guest.get("rounds")
        guest.vm.qmp.command("cont")
        guest.wait_rounds(1)
        assert guest.get("rounds") > rounds
    guest.vm.qmp.command("system_reset")
    wait_for(lambda: guest.get("rounds") < rounds, "the guest to start again", 60)
    guest.wait_rounds()
    guest.check_disk()


def refused(*options: str) -> str:
    """What the VMM says of these options, which it does not start with."""
    words = [*VMM, "-nodefaults", "-accel", "tcg", "-m", "16M", *options]
    run = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    return run.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("-device virtio-blk-pci", "-device virtio-blk-pci: drive property not set"),
        (
            "-device virtio-blk-pci,drive=x",
            "Property 'virtio-blk-device.drive' can't find value 'x'",
        ),
        (
            "-drive if=none,id=d,format=raw,file={disk} -device virtio-blk-pci,drive=d "
            "-device virtio-blk-pci,drive=d",
            "Property 'virtio-blk-device.drive' can't take value 'd', it's in use",
        ),
        ("-drive if=virtio,format=raw,file=/none", "Could not open '/none': No such file"),
        ("-drive if=virtio,format=raw,file={disk}", "nothing to boot: no firmware would boot"),
        (
            "-drive if=none,id=d,format=raw,file={disk} "
            "-device virtio-blk-pci,drive=d,num-queues=100",
            "num-queues property must be in the range 1 to 64",
        ),
        (
            "-drive if=none,id=d,format=raw,file={disk} "
            "-device virtio-blk-pci,drive=d,queue-size=100",
            "invalid queue-size property (100), must be a power of 2 (max 1024)",
        ),
        ("-device virtio-net-pci", "-device virtio-net-pci: netdev property not set"),
        (
            "-device virtio-net-pci,netdev=n",
            "Property 'virtio-net-device.netdev' can't find value 'n'",
        ),
        ("-netdev user,id=n", "Parameter 'type' does not accept value 'user'"),
        ("-netdev tap", "Parameter 'id' is missing"),
        ("-netdev tap,id=n,vhost=off,vhostfd=3", "vhostfd(s)= is not valid without vhost"),
        ("-netdev tap,id=n,cpr=off", "a tap goes over every update"),
        ("-netdev tap,id=n,fd=3,ifname=x", "are invalid with fd="),
        (
            "-netdev tap,id=n,fd=99 -device virtio-net-pci,netdev=n",
            "-device virtio-net-pci,netdev=n: netdev fd=99: Bad file descriptor",
        ),
        ("-netdev tap,id=n,fd=0 -device virtio-net-pci,netdev=n", "descriptor 0 is not a tap"),
        ("-device virtio-rng-pci,period=0", "'period' parameter expects a positive integer"),
        ("-device virtio-rng-pci,disable-modern=on", "device is modern-only"),
        ("-device virtio-rng-pci,bus=pci.1", "Bus 'pci.1' not found"),
        ("-device virtconsole", "No 'virtio-serial-bus' bus found for device 'virtconsole'"),
        (
            "-device virtio-serial-pci -device virtconsole -device virtconsole",
            "a virtio-serial-pci has one port here",
        ),
    ],
)
def test_refusals(disk: Path, options: str, text: str) -> None:
    error = refused(*options.format(disk=disk).split())
    assert text in error
    assert "Traceback" not in error


def test_a_disk_in_use_is_refused(disk: Path) -> None:
    guest = Guest("tcg", disk, "-drive", f"file={disk},format=raw,if=virtio")
    try:
        error = refused("-drive", f"file={disk},format=raw,if=virtio")
        assert 'Failed to get "write" lock' in error
        assert f"Is another process using the image [{disk}]?" in error
        guest.wait_rounds()
        guest.update(True)
        assert "lock" in refused("-drive", f"file={disk},format=raw,if=virtio")
        assert "lock" not in refused("-drive", f"file={disk},format=raw,if=virtio,file.locking=off")
    finally:
        guest.vm.close()


def two_disks(disk: Path, other: Path, second: str) -> list[str]:
    return [
        *("-drive", f"file={disk},format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0"),
        *("-drive", f"file={other},format=raw,if=none,id={second}"),
        *("-device", f"virtio-blk-pci,drive={second}"),
    ]


def test_a_target_that_may_not_have_a_disk_leaves_the_source_its_locks(disk: Path) -> None:
    """The first disk's descriptor came over; the second one's has another name."""
    other = disk.with_name("other.img")
    other.write_bytes(bytes(MIB))
    guest = Guest("tcg", disk, *two_disks(disk, other, "d1"))
    main, cpr = (
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
        for kind, path in (("main", f"{disk}.main"), ("cpr", f"{disk}.cpr"))
    )
    words = guest.vm.words[: guest.vm.words.index("-drive")]
    incoming = ["-incoming", json.dumps(main), "-incoming", json.dumps(cpr)]
    target = subprocess.Popen(
        [*words, *two_disks(disk, other, "d2"), *incoming], stderr=subprocess.PIPE, text=True
    )
    try:
        guest.wait_rounds()
        wait_for(lambda: is_listening(f"{disk}.cpr"), "the target listens")
        guest.vm.ask("migrate-set-parameters", mode="cpr-transfer")
        guest.vm.ask("migrate", channels=[main, cpr])
        assert target.wait(60) == 1
        assert 'Failed to get "write" lock' in target.stderr.read()
        guest.vm.ask("cont")
        guest.wait_rounds()
        for path in (disk, other):
            assert "lock" in refused("-drive", f"file={path},format=raw,if=virtio")
    finally:
        target.kill()
        target.wait()
        target.stderr.close()
        guest.vm.close()
