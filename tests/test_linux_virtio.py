"""Linux with a disk, a network card, a console and a random source, through updates and sleep."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import missing_tcg
from harness.network import GUEST, HOST, own_network
from linux_guest import LinuxGuest, linux_image
from waiting import wait_for, wait_for_change

__all__ = ["linux_image"]

BLOCK = 128 << 10
STREAM = 4 << 20
DISK = 32 << 20
SECONDS = 60

# Each block is written, read back, and its checksum kept.  A guest that goes to sleep cuts a read
# of /dev/urandom short.
WRITER = f"""
i=0
while [ ! -e /tmp/stop ]; do
  dd if=/dev/urandom of=/tmp/block bs={BLOCK} count=1 iflag=fullblock 2>/dev/null
  md5sum </tmp/block >/tmp/sum.$i
  dd if=/tmp/block of=/dev/vda bs={BLOCK} seek=$i oflag=direct 2>/dev/null
  dd if=/dev/vda bs={BLOCK} skip=$i count=1 iflag=direct 2>/dev/null | md5sum |
    cmp - /tmp/sum.$i || echo block $i >>/tmp/wrong
  i=$((i + 1)); echo $i >/tmp/next; mv /tmp/next /tmp/count
done
"""


def prepare(folder: Path, size: int, seconds: float) -> tuple[Path, socket.socket]:
    """An empty disk of so many bytes, and who listens for the guest in a network of its own.

    Skips where that cannot be.
    """
    try:
        own_network()
    except RuntimeError as error:
        pytest.skip(str(error))
    disk = folder / "disk.img"
    disk.touch()
    os.truncate(disk, size)
    listener = socket.create_server((HOST, 6000))
    listener.settimeout(seconds)
    return disk, listener


class Stream:
    """A TCP connection with the guest: bytes that it gets, and bytes that it sends."""

    @classmethod
    def start(cls, guest: LinuxGuest, listener: socket.socket) -> Stream:
        """The guest connects, with bytes of its own in /tmp/sent."""
        guest.ask(
            f"dd if=/dev/urandom of=/tmp/sent bs={STREAM} count=1; md5sum </tmp/sent >/tmp/want"
        )
        guest.ask(f"(nc {HOST} 6000 </tmp/sent | md5sum >/tmp/got) & true")
        return cls(listener)

    def __init__(self, listener: socket.socket) -> None:
        self.received = hashlib.md5()
        self.data = os.urandom(STREAM)
        self._socket = listener.accept()[0]
        self._socket.settimeout(SECONDS)
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        self._socket.sendall(self.data)
        self._socket.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while data := self._socket.recv(65536):
            self.received.update(data)

    def check(self, guest: LinuxGuest) -> None:
        """Each side has got all that the other has sent."""
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        assert guest.ask("sleep 1; cat /tmp/got").split()[0] == hashlib.md5(self.data).hexdigest()
        assert guest.ask("cat /tmp/want").split()[0] == self.received.hexdigest()


def test_what_a_guest_works_with_lives_through_updates(start, linux_image, tmp_path) -> None:
    reason = missing_tcg()
    if reason is not None:
        pytest.skip(reason)
    with ThreadPoolExecutor(1) as thread:  # whose network is its own
        thread.submit(run, start, tmp_path).result()


def run(start, folder: Path) -> None:
    disk, listener = prepare(folder, DISK, SECONDS)
    guest = LinuxGuest(
        start,
        folder,
        *("-accel", "tcg", "-drive", f"file={disk},format=raw,if=virtio"),
        *("-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=n0", "-device", "virtio-rng-pci"),
        *("-chardev", f"socket,id=hvc,path={folder}/hvc.sock,server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=hvc"),
    )
    assert guest.ask("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    guest.ask(f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0")
    guest.write("/tmp/writer", WRITER)
    guest.ask("sh /tmp/writer & true")
    stream = Stream.start(guest, listener)
    for way in ("early", "late"):
        guest.update(way)
        wait_for_change(lambda: int(guest.ask("cat /tmp/count")), "the writer goes on")
    check_console(f"{folder}/hvc.sock", guest)
    stream.check(guest)

    guest.type("echo mem >/sys/power/state; echo wo''ken")
    wait_for(
        lambda: guest.vm.qmp.command("query-status")["status"] == "suspended", "the guest sleeps"
    )
    guest.vm.qmp.command("system_wakeup")
    guest.read_until("woken\n")
    wait_for_change(lambda: int(guest.ask("cat /tmp/count")), "the writer goes on")
    guest.ask(f"ping -c 1 {HOST} >/tmp/ping || echo no answer >>/tmp/wrong")

    guest.ask("touch /tmp/stop; wait")
    assert guest.ask("cat /tmp/wrong 2>/dev/null") == ""
    check_blocks(guest, disk)
    assert guest.troubles() == []
    assert guest.vm.complaints == ""
    guest.type("poweroff -f")
    assert guest.vm.process.wait(30) == 0


def check_blocks(guest: LinuxGuest, disk: Path) -> None:
    """Each block that the guest has written is in the image as it was when it was written."""
    count = int(guest.ask("cat /tmp/count"))
    sums = guest.ask(f"for i in $(seq 0 {count - 1}); do cat /tmp/sum.$i; done").split("\n")
    # An emergency message of the kernel comes in between whatever its level is.
    assert [line for line in sums if not re.match(r"[0-9a-f]{32} ", line)] == []
    with open(disk, "rb") as image:
        written = [hashlib.md5(image.read(BLOCK)).hexdigest() for _ in range(count)]
    assert [line.split()[0] for line in sums] == written


def check_console(path: str, guest: LinuxGuest) -> None:
    """What is typed at hvc0 comes to the guest, and what it says comes here."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(path)
        guest.ask("(read line </dev/hvc0; echo heard $line >/dev/hvc0) & true")
        client.sendall(b"hello\n")
        said = b""
        while b"heard hello" not in said:
            said += client.recv(1000)
