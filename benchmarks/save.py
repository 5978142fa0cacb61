"""Saving a guest's RAM to a file on a tmpfs with cpr-reboot, RAM copied, beside QEMU.

What is timed is from `migrate` to the status `completed`, as a client of the monitor sees it.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from harness.vm import Vm

from benchmarks.cases import GIB, MIB, MODES, Case, size_text
from benchmarks.machines import started
from benchmarks.peer import Peer
from benchmarks.ram_copy import touch
from benchmarks.report import table
from benchmarks.rounds import Progress, take_turns

KINDS = ("random", "zero", "untouched")
TMPFS = "/dev/shm"
FIRST = 16 * MIB  # what is below may be the guest's
TILE = 64 * MIB
POLL = 0.002
UNLIMITED = 1 << 40  # bytes a second: what is measured is the saving, not max-bandwidth


class Saver:
    """A VM whose RAM is of pages of one kind, and is saved in its turn."""

    def __init__(
        self, case: Case, kind: str, peer: Peer | None, seconds: list[float], stack: ExitStack
    ) -> None:
        self.seconds = seconds
        root = peer.root if peer is not None and case.mode == "qemu" else ""
        if not os.path.ismount(f"{root}{TMPFS}"):
            raise RuntimeError(f"{root}{TMPFS} is no tmpfs")
        self._name = f"{TMPFS}/cpr-benchmark-{os.getpid()}-{case.mode}"
        self._file = Path(f"{root}{self._name}")
        self._size = case.ram
        self._kind = kind
        self._vm = stack.enter_context(started(case, peer))
        stack.callback(self._file.unlink, missing_ok=True)
        self._vm.qmp.command("stop")
        if kind != "untouched":
            fill(self._vm, kind)

    def turn(self) -> None:
        """Adds the seconds of one save."""
        vm = self._vm
        if self._kind == "untouched":
            punch(self._vm)  # a VMM that reads a hole has filled it
        touch(2 * self._size)
        vm.qmp.command("migrate-set-parameters", mode="cpr-reboot", max_bandwidth=UNLIMITED)
        begin = time.monotonic()
        vm.qmp.command("migrate", uri=f"file:{self._name}")
        while (status := vm.qmp.command("query-migrate"))["status"] != "completed":
            if status["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"saving failed: {status.get('error-desc', vm.stderr)}")
            time.sleep(POLL)
        self.seconds.append(time.monotonic() - begin)
        self._file.unlink()
        vm.qmp.command("cont")  # nothing can be saved again that has not run since
        vm.qmp.command("stop")


def fill(vm: Vm, kind: str) -> None:
    """Gives each page of the guest's RAM after the first MiB random bytes of its own, or zeros."""
    tile = os.urandom(TILE) if kind == "random" else bytes(TILE)
    for offset in range(FIRST, len(vm.ram), TILE):
        size = min(TILE, len(vm.ram) - offset)
        vm.ram[offset : offset + size] = tile[:size]


def punch(vm: Vm) -> None:
    """Makes a hole of the RAM after the first MiB, as where the guest has never been."""
    vm.ram.madvise(mmap.MADV_REMOVE, FIRST, len(vm.ram) - FIRST)


def measure(
    modes: list[str], accel: str, ram: int, rounds: int, peer: Peer | None, progress: Progress
) -> list[dict[str, Any]]:
    """Saves RAM of each kind by each VMM in turn; one entry for each of both."""
    found = []
    for kind in KINDS:
        cases = [Case(mode, accel, ram, "4K", "lazy") for mode in modes]
        seconds: dict[Case, list[float]] = {case: [] for case in cases}

        def start(case: Case, stack: ExitStack, kind: str = kind, seconds: Any = seconds) -> Saver:
            return Saver(case, kind, peer, seconds[case], stack)

        left_out = take_turns(cases, start, rounds, progress, touched=True)
        for case in cases:
            own = {"kind": kind, "seconds": seconds[case], "skipped": left_out.get(case, "")}
            found.append(case.to_dict() | own)
    return found


def markdown(entries: list[dict[str, Any]]) -> str:
    """A row for each kind of pages and VMM that was measured, with QEMU's time over this one's."""
    qemu = {
        entry["kind"]: median(entry["seconds"])
        for entry in entries
        if entry["mode"] == "qemu" and not entry["skipped"]
    }
    rows = []
    for entry in sorted(entries, key=lambda e: (e["kind"], MODES.index(e["mode"]))):
        if entry["skipped"]:
            continue
        took, own = median(entry["seconds"]), entry["mode"] != "qemu"
        ratio = f"{qemu[entry['kind']] / took:.1f}" if own and entry["kind"] in qemu else ""
        rows.append(
            [
                *(entry["kind"], size_text(entry["ram"]), "cpr" if own else "qemu"),
                *(
                    f"{took:.2f}",
                    f"{max(entry['seconds']):.2f}",
                    f"{entry['ram'] / GIB / took:.2f}",
                ),
                *(str(len(entry["seconds"])), ratio),
            ]
        )
    columns = ("pages", "RAM", "VMM", "median s", "max s", "GiB/s", "saves", "QEMU / this")
    return table(columns, rows)


def line(entry: dict[str, Any]) -> str:
    name = f"save {size_text(entry['ram'])} of {entry['kind']} pages, {entry['mode']}"
    if entry["skipped"]:
        return f"{name}: left out: {entry['skipped']}"
    return f"{name}: {median(entry['seconds']):.2f} s"
