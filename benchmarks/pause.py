"""The pause of an update as the observer sees it, against RAM size, page size and accelerator."""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.observer import HEARTBEAT, Observer
from benchmarks.vm import ROOT, Vm

MIB = 1 << 20
HUGEPAGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
IMAGE = ROOT / "examples" / "build" / "heartbeat.img"
SETTLE = 0.25
BOOT_TIMEOUT = 60.0  # of a BIOS under a slow KVM


@dataclass(frozen=True)
class Peer:
    """A real QEMU: its command, and the folder that it has as its root ("" for none)."""

    command: list[str]
    root: str


@dataclass(frozen=True)
class Case:
    """One thing to measure: `ram` in bytes, `pages` "4K" or "2M", `vmm` "cpr" or "qemu"."""

    vmm: str
    accel: str
    ram: int
    pages: str
    prealloc: bool

    @property
    def label(self) -> str:
        backing = "prealloc" if self.prealloc else "lazy"
        return f"{self.vmm} {self.accel} {self.ram // MIB} MiB {self.pages} {backing}"


@dataclass
class Result:
    """Pauses in ms of each update; `baseline` is the longest gap without an update, `skipped` why
    the case could not be run."""

    case: Case
    pauses: list[float] = field(default_factory=list)
    baseline: float = 0.0
    skipped: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.pauses)

    @property
    def p99(self) -> float:
        return sorted(self.pauses)[min(len(self.pauses) - 1, int(len(self.pauses) * 0.99))]


@contextmanager
def hugepages(count: int) -> Iterator[None]:
    """Makes `count` huge pages of 2 MiB available, and gives them back in any case."""
    if not count:
        yield
        return
    before = HUGEPAGE_POOL.read_text()
    try:
        HUGEPAGE_POOL.write_text(str(count))
        got = int(HUGEPAGE_POOL.read_text())
        if got < count:
            raise RuntimeError(f"only {got} of {count} huge pages of 2 MiB can be had")
        yield
    finally:
        HUGEPAGE_POOL.write_text(before)


def arguments(case: Case, image: str) -> list[str]:
    """The options of the VM, the same for every VMM."""
    backend = f"memory-backend-memfd,id=ram0,size={case.ram},share=on"
    if case.pages == "2M":
        backend += ",hugetlb=on,hugetlbsize=2M"
    if case.prealloc:
        backend += ",prealloc=on"
    return [
        *("-nodefaults", "-display", "none", "-accel", case.accel, "-m", f"{case.ram // MIB}M"),
        *("-object", backend, "-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", f"file={image},format=raw,if=floppy"),
    ]


@contextmanager
def started(case: Case, peer: Peer | None) -> Iterator[Vm]:
    if case.vmm == "cpr":
        with Vm(*arguments(case, str(IMAGE))) as vm:
            yield vm
        return
    assert peer is not None
    copy = Path(f"{peer.root}/tmp/heartbeat-{os.getpid()}.img")
    copy.write_bytes(IMAGE.read_bytes())
    try:
        path = str(copy).removeprefix(peer.root)
        with Vm(*arguments(case, path), command=peer.command, root=peer.root) as vm:
            yield vm
    finally:
        copy.unlink()


def update(vm: Vm, case: Case, peer: Peer | None) -> None:
    """One cpr-exec, as each VMM offers it."""
    if case.vmm == "cpr":
        vm.update()
        return
    assert peer is not None
    # Inside its root QEMU is called by its own name; what precedes that is how to get there.
    words = vm.words[len(peer.command) - 1 :]
    state = f"{str(vm.directory).removeprefix(peer.root)}/state"
    command = [*words, "-incoming", f"file:{state}"]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    vm.qmp.command("migrate", uri=f"file:{state}")
    vm.reconnect()


def wait_for_heartbeat(vm: Vm) -> None:
    """Waits until the guest counts; raises RuntimeError if it never does."""
    deadline = time.monotonic() + BOOT_TIMEOUT
    first = vm.u32(HEARTBEAT)
    while vm.u32(HEARTBEAT) == first:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the guest does not count: {vm.stderr}")
        time.sleep(0.01)


def measure(case: Case, updates: int, peer: Peer | None) -> Result:
    """Runs one case.  What cannot be run is left out, with the reason in the result."""
    result = Result(case)
    need = case.ram // (2 * MIB) if case.pages == "2M" else 0
    try:
        with hugepages(need), started(case, peer) as vm:
            observer = Observer(vm.ram_path())
            wait_for_heartbeat(vm)
            time.sleep(SETTLE)
            begin = time.monotonic_ns()
            time.sleep(SETTLE)
            gap = observer.longest_since(begin)
            result.baseline = gap.length_ns / 1e6 if gap else 0.0
            for _ in range(updates):
                start = time.monotonic_ns()
                update(vm, case, peer)
                time.sleep(SETTLE)
                gap = observer.longest_since(start)
                if gap is None:
                    raise RuntimeError(f"no pause seen: {vm.stderr}")
                result.pauses.append(gap.length_ns / 1e6)
            observer.stop()
    except (OSError, RuntimeError, ValueError) as error:
        result.skipped = str(error).strip().splitlines()[-1]
    return result


def parse_peer(command: str) -> Peer:
    """`/usr/bin/qemu-system-x86_64`, or `chroot FOLDER qemu-system-x86_64`."""
    words = shlex.split(command)
    return Peer(words, words[1] if words[0].endswith("chroot") else "")
