"""The VMs of the cases: started with the same options, and updated as each VMM offers it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.qmp import QmpError
from harness.vm import HEARTBEAT, ROOT, Vm

from benchmarks.cases import GIB, HUGETLB, Case, size_text
from benchmarks.peer import Peer

IMAGES = ROOT / "examples" / "build"
BOOT_TIMEOUT = 120.0  # of a BIOS under a slow KVM
# A host may take long to give memory back that it had taken from a virtual machine.
POPULATE_TIMEOUT_PER_GIB = 10.0
PARAMETERS = {
    "late": {"x-cpr-exec-overlap": "off"},
    "early": {"x-cpr-exec-overlap": "on"},
}
# What a case that cannot be run fails with.
FAILURES = (OSError, RuntimeError, ValueError, QmpError)


def arguments(case: Case, image: str) -> list[str]:
    """The options of the VM, the same for every VMM."""
    backend = f"memory-backend-memfd,id=ram0,size={size_text(case.ram)},share=on"
    if case.pages in HUGETLB:
        backend += f",hugetlb=on,hugetlbsize={case.pages}"
    if case.backing == "prealloc":
        backend += ",prealloc=on"
    return [
        *("-nodefaults", "-display", "none", "-accel", case.accel, "-m", size_text(case.ram)),
        *("-object", backend, "-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", f"file={image},format=raw,if=floppy", "-serial", "null"),
    ]


@contextmanager
def started(case: Case, peer: Peer | None, guest: str | None = None) -> Iterator[Vm]:
    """Runs the VM of `case`, or with another guest; it counts when this returns.

    Raises one of FAILURES where it does not run.
    """
    guest = guest or case.guest
    image = IMAGES / f"{guest}.img"
    timeout = BOOT_TIMEOUT + case.ram / GIB * POPULATE_TIMEOUT_PER_GIB
    if case.mode != "qemu":
        with Vm(*arguments(case, str(image)), timeout=timeout) as vm:
            wait_for_heartbeat(vm)
            yield vm
        return
    assert peer is not None
    copy = Path(f"{peer.root}/tmp/{guest}-{os.getpid()}-{time.monotonic_ns()}.img")
    copy.write_bytes(image.read_bytes())
    try:
        words = arguments(case, peer.inside(copy))
        with Vm(*words, command=peer.command, root=peer.root, timeout=timeout) as vm:
            wait_for_heartbeat(vm)
            yield vm
    finally:
        copy.unlink()


def choose_mode(vm: Vm, case: Case) -> None:
    """Sets the migration parameter of the case's mode, which a new image has forgotten.

    Raises RuntimeError where the VMM does not know it.
    """
    for name, value in PARAMETERS.get(case.mode, {}).items():
        try:
            vm.qmp.command("migrate-set-parameters", **{name: value})
        except QmpError as error:
            raise RuntimeError(f"the VMM refuses {name}: {error}") from None


def update(vm: Vm, case: Case, peer: Peer | None) -> None:
    """One cpr-exec, to the new image's monitor being there."""
    if case.mode == "qemu":
        assert peer is not None
        state = peer.inside(vm.directory / "state")
        command = [*peer.own_words(vm.words), "-incoming", f"file:{state}"]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        vm.qmp.command("migrate", uri=f"file:{state}")
        vm.reconnect()
        return
    choose_mode(vm, case)
    vm.update()


def keep_vcpus_off(vm: Vm, cpu: int) -> None:
    """Has the vCPUs run on other CPUs than the observer's, where there are others.

    A QEMU's new image has new threads, which may run anywhere again.
    """
    if others := os.sched_getaffinity(vm.pid) - {cpu}:
        for vcpu in vm.qmp.command("query-cpus-fast"):
            os.sched_setaffinity(vcpu["thread-id"], others)


def wait_for_heartbeat(vm: Vm, timeout: float = BOOT_TIMEOUT) -> None:
    """Waits until the guest counts; raises RuntimeError if it never does."""
    deadline = time.monotonic() + timeout
    first = vm.u32(HEARTBEAT)
    while vm.u32(HEARTBEAT) == first:
        if vm.process.poll() is not None:
            raise RuntimeError(f"the VMM has ended: {vm.stderr}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the guest has not counted for {timeout:.0f} s")
        time.sleep(0.001)


def wait_until_populated(vm: Vm, case: Case) -> None:
    """Waits until the RAM of a case with prealloc is in the VMM's page tables."""
    if case.backing != "prealloc":
        return
    timeout = BOOT_TIMEOUT + case.ram / GIB * POPULATE_TIMEOUT_PER_GIB
    deadline = time.monotonic() + timeout
    while vm.resident() < case.ram:
        if time.monotonic() > deadline:
            raise RuntimeError(f"RAM is not populated after {timeout:.0f} s")
        time.sleep(0.02)


def reason(error: Exception) -> str:
    """The last line of what a case failed with."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
