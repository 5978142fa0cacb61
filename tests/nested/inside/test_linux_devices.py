"""Linux on KVM with a host's NVMe controller, a virtio disk and a network, over early updates.

Writers on a file system of the one and on the other read back what they have written, and a TCP
connection carries known bytes both ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from harness.network import GUEST
from linux_guest import LinuxGuest, linux_image
from test_linux_virtio import WRITER, Stream, check_blocks, prepare
from waiting import wait_for_change

from cpr.constants import NS_PER_MS

from .guest import device_words
from .machine import NVME, command
from .test_linux import COMMAND_LINE, SECONDS, troubles

__all__ = ["linux_image"]

UPDATES = 10
DISK = 256 << 20
FILES = 40
TICK = 0.02  # s: /proc/uptime has hundredths
DRIFT = 0.01  # the emulated clocks of the VM and of its guest are calibrated each for itself

# Each file is written and read back from the device; FILES of them are there at the end.
FILE_WRITER = f"""
i=0
while [ ! -e /tmp/stop ]; do
  f=$((i % {FILES}))
  dd if=/dev/urandom of=/tmp/part bs=64k count=1 iflag=fullblock 2>/dev/null
  md5sum </tmp/part >/tmp/part.$f
  dd if=/tmp/part of=/mnt/$f bs=64k conv=fsync 2>/dev/null
  dd if=/mnt/$f bs=64k iflag=direct 2>/dev/null | md5sum |
    cmp - /tmp/part.$f || echo file $i >>/tmp/wrong
  i=$((i + 1)); echo $i >/tmp/next-file; mv /tmp/next-file /tmp/files
done
"""


def test_all_that_linux_works_with_lives_through_updates(
    start, linux_image, tmp_path, fact: Callable[[str], None]
) -> None:
    with ThreadPoolExecutor(1) as thread:  # whose network is its own
        thread.submit(run, start, tmp_path, fact).result()


def count(guest: LinuxGuest, path: str) -> int:
    return int(guest.ask(f"cat {path}") or 0)


def run(start, folder: Path, fact: Callable[[str], None]) -> None:
    disk, listener = prepare(folder, DISK, SECONDS)
    vhost = "on" if Path("/dev/vhost-net").exists() else "off"
    began = time.monotonic()
    guest = LinuxGuest(
        start,
        folder,
        *("-accel", "kvm", "-smp", "2", "-append", COMMAND_LINE),
        *("-global", "migration.x-cpr-exec-timeout=200000"),  # the host may be loaded
        *device_words("type1", NVME),
        *("-drive", f"file={disk},format=raw,if=virtio"),
        *("-netdev", f"tap,id=n0,ifname=tap0,script=no,downscript=no,vhost={vhost}"),
        *("-device", "virtio-net-pci,netdev=n0", "-device", "virtio-rng-pci"),
        seconds=SECONDS,
    )
    fact(f"Linux: a prompt after {time.monotonic() - began:.0f} s")
    guest.ask("dmesg -c >/dev/null; (clockwatch /tmp/clock &)")
    guest.ask(f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0")
    guest.ask(
        "mkdir /mnt; mke2fs /dev/nvme0n1 >/dev/null && mount /dev/nvme0n1 /mnt || echo no mount"
    )
    assert "nvme0n1 /mnt" in guest.ask("cat /proc/mounts")
    guest.write("/tmp/writer", WRITER)
    guest.write("/tmp/file-writer", FILE_WRITER)
    guest.ask("sh /tmp/writer & sh /tmp/file-writer & word=kept")
    stream = Stream.start(guest, listener)
    fact(f"Linux: all works after {time.monotonic() - began:.0f} s")
    shell, enabled = guest.ask("echo $$"), command(NVME)

    pauses, steps = [], []
    for _ in range(UPDATES):
        began, before, _ = guest.uptime()
        guest.update("early")
        migration = guest.vm.qmp.command("query-migrate")
        assert migration["status"] == "completed", (migration, guest.vm.complaints)
        pauses.append(migration["x-cpr-downtime-ns"] / NS_PER_MS)
        _, after, ended = guest.uptime()
        steps.append(f"{after - before:.2f} of {ended - began:.2f}")
        assert before <= after <= before + (ended - began) * (1 + DRIFT) + TICK, steps
        for path in ("/tmp/count", "/tmp/files"):
            wait_for_change(partial(count, guest, path), "the writer goes on")
    fact(f"Linux: it stood still for {', '.join(f'{ms:.1f}' for ms in pauses)} ms")
    fact(f"Linux: its clock went on by {', '.join(steps)} s")
    assert guest.ask("echo $word $$") == f"kept {shell}"
    assert command(NVME) == enabled

    stream.check(guest)
    guest.ask("touch /tmp/stop; wait")
    assert guest.ask("cat /tmp/wrong 2>/dev/null") == ""
    fact(f"Linux: {count(guest, '/tmp/count')} blocks, {count(guest, '/tmp/files')} files written")
    check_blocks(guest, disk)
    guest.ask("umount /mnt && mount /dev/nvme0n1 /mnt")
    wrong = "md5sum </mnt/$f | cmp - /tmp/part.$f || echo wrong"
    assert guest.ask(f"for f in $(cd /mnt; ls | grep -v lost); do {wrong}; done") == ""
    assert guest.ask("ls /mnt | wc -l") != "0"

    reads, back, longest = guest.clock()
    fact(
        f"Linux: the clock was read {reads} times, went back {back} times, by {longest} ms at most"
    )
    assert back == 0
    fact(f"Linux: its log since then: {guest.ask('dmesg')}")
    assert troubles(guest) == []
    guest.vm.qmp.command("system_powerdown")
    assert guest.vm.process.wait(SECONDS) == 0
    assert guest.vm.complaints == ""
