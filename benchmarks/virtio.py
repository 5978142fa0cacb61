"""Disk and network of a Linux guest, beside QEMU's: what the guest gets through virtio.

The disk is a file on a tmpfs, the network a tap whose other end is a socket on this host.  The VMMs
take turns; one is stopped while the other is measured.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median
from typing import Any

from harness.network import HOST, own_network

from benchmarks.cases import MIB
from benchmarks.machines import FAILURES, reason
from benchmarks.peer import Peer
from benchmarks.report import table
from benchmarks.rounds import Progress
from benchmarks.virtio_guest import DISK, start
from examples.linux.build import Unavailable

TURN_SECONDS = 60.0
SEQUENTIAL = DISK // MIB  # blocks of 1 MiB
RANDOM = {1: 2000, 32: 8000}  # reads of 4 KiB, by how many are under way at a time
STREAM = 256 * MIB
CHUNK = MIB
PORT = 6000
UNITS = {"blocks": "4 KiB reads/s", "bytes": "MiB/s"}
KINDS = {
    "read": "sequential read, 1 MiB blocks",
    "write": "sequential write, 1 MiB blocks",
    "random-1": "random read, one at a time",
    "random-32": "random read, 32 at a time",
    "send": "TCP, guest to host",
    "receive": "TCP, host to guest",
}


class Guest:
    """A guest of one VMM, stopped but for its turns.  All is done in its network's own thread."""

    def __init__(self, accel: str, peer: Peer | None, stack: ExitStack) -> None:
        self._thread = stack.enter_context(ThreadPoolExecutor(1))
        self._thread.submit(self._start, accel, peer, stack).result()

    def _start(self, accel: str, peer: Peer | None, stack: ExitStack) -> None:
        own_network("vnet_hdr")
        self._vm, self._console = start(accel, peer, stack)
        self._listener = socket.create_server((HOST, PORT))
        self._listener.settimeout(TURN_SECONDS)
        stack.callback(self._listener.close)
        self._vm.qmp.command("stop")

    def turn(self, kind: str) -> float:
        """Measures one of KINDS once: MiB or reads a second.  Raises one of FAILURES."""
        return self._thread.submit(self._turn, kind).result()

    def _turn(self, kind: str) -> float:
        self._vm.qmp.command("cont")
        try:
            if kind in ("send", "receive"):
                return self._stream(kind)
            what, _, depth = kind.partition("-")
            words = f"{RANDOM[int(depth)]} {depth}" if depth else SEQUENTIAL
            return float(self._ask(f"guest-io {what} /dev/vda {words}"))
        finally:
            self._vm.qmp.command("stop")

    def _ask(self, command: str) -> str:
        return self._console.ask(f"{command} 2>&1", TURN_SECONDS)

    def _stream(self, kind: str) -> float:
        """One connection, timed at this end from its first byte to its last."""
        bytes_ = str(STREAM) if kind == "send" else ""
        self._console.type(f"guest-io {kind} {HOST} {PORT} {bytes_}")
        with self._listener.accept()[0] as connection:
            connection.settimeout(TURN_SECONDS)
            moved = _receive(connection) if kind == "send" else _send(connection)
        self._ask("true")
        return moved


def _receive(connection: socket.socket) -> float:
    buffer = bytearray(CHUNK)
    total = connection.recv_into(buffer)
    begin = time.monotonic()
    while count := connection.recv_into(buffer):
        total += count
    if total != STREAM:
        raise RuntimeError(f"{total} bytes came of {STREAM}")
    return total / MIB / (time.monotonic() - begin)


def _send(connection: socket.socket) -> float:
    """To the end of the guest's reading, which closes the connection."""
    begin = time.monotonic()
    block = bytes(CHUNK)
    for _ in range(STREAM // CHUNK):
        connection.sendall(block)
    connection.shutdown(socket.SHUT_WR)
    if connection.recv(1):
        raise RuntimeError("the guest answers what it must not")
    return STREAM / MIB / (time.monotonic() - begin)


def measure(
    modes: list[str],
    accel: str,
    kinds: list[str],
    rounds: int,
    peer: Peer | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Each kind on each VMM (`modes`: "cpr", "qemu") in turn; one entry for each of both."""
    entries: dict[tuple[str, str], dict[str, Any]] = {
        (kind, mode): {"kind": kind, "mode": mode, "accel": accel, "rates": [], "skipped": ""}
        for kind in kinds
        for mode in modes
    }
    with ExitStack() as stack:
        guests = {}
        for mode in modes:
            progress(f"{mode}: boots")
            try:
                guests[mode] = Guest(accel, peer if mode == "qemu" else None, stack)
            except (*FAILURES, Unavailable) as error:
                for kind in kinds:
                    entries[kind, mode]["skipped"] = reason(error)
        for kind in kinds:
            for number in range(rounds):
                for mode, guest in guests.items():
                    entry = entries[kind, mode]
                    if entry["skipped"]:
                        continue
                    progress(f"{kind}, {mode}: {number + 1}/{rounds}")
                    try:
                        entry["rates"].append(guest.turn(kind))
                    except FAILURES as error:
                        entry["skipped"] = reason(error)
    return list(entries.values())


def unit(kind: str) -> str:
    return UNITS["blocks" if kind.startswith("random") else "bytes"]


def line(entry: dict[str, Any]) -> str:
    name = f"{KINDS[entry['kind']]}, {entry['mode']}"
    if entry["skipped"]:
        return f"{name}: left out: {entry['skipped']}"
    return f"{name}: {median(entry['rates']):.0f} {unit(entry['kind'])}"


def markdown(entries: list[dict[str, Any]]) -> str:
    """A row for each kind, with this VMM's rate over QEMU's."""
    found = {(entry["kind"], entry["mode"]): entry["rates"] for entry in entries if entry["rates"]}
    accels = {entry["kind"]: entry["accel"] for entry in entries}
    rows = []
    for kind, accel in accels.items():
        own, qemu = found.get((kind, "cpr")), found.get((kind, "qemu"))
        if own is None:
            continue
        row = [KINDS[kind], accel, unit(kind), f"{median(own):.0f}"]
        row += [f"{min(own):.0f} to {max(own):.0f}", f"{median(qemu):.0f}" if qemu else ""]
        row += [f"{median(own) / median(qemu):.2f}" if qemu else "", str(len(own))]
        rows.append(row)
    columns = ("what", "accel", "unit", "this", "from, to", "QEMU", "this / QEMU", "rounds")
    return table(columns, rows)
