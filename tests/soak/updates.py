"""N updates of one VM under load, good and failing, early and late: `make soak N=1000`.

The guest churns through its memory, a client has the serial port and another the monitor; then
ten VMs are updated at once.  Prints what is left over now and then, and whether it is flat.

With --lock FILE it has a shared lock (flock(2)) on that file while it runs, and gives it up once a
minute, with the guest stopped: whoever needs the machine for a while takes an exclusive one.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from harness.vm import Vm  # noqa: E402
from waiting import wait_for, wait_for_change  # noqa: E402

from soak.failures import (  # noqa: E402
    CHURN_MISMATCHES,
    CHURN_PAGES,
    MOST_GROWTH,
    SETTLE,
    commands,
    fail_once,
    measure,
    show,
)

DEADLINE_MS = 2000  # for those that are to fail
KINDS = ("early", "late", "early", "failing", "late", "failing")
SAMPLES = 10
MANY, LONG_MS = 10, 600_000  # a good one has its time, whatever else the machine does
PIECE_S, BREAK_S = 60, 1


class Turns:
    """Whether the soak may run now; `lock` is the path of a file, or None: always."""

    def __init__(self, lock: str | None) -> None:
        self._file = open(lock, "a") if lock is not None else None  # noqa: SIM115
        self._until = 0.0

    def __enter__(self) -> Turns:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            self._until = time.monotonic() + PIECE_S
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def over(self, vm: Vm) -> None:
        """Between two updates: has somebody else's turn, if it is time."""
        if self._file is None or time.monotonic() < self._until:
            return
        vm.ask("stop")
        self.__exit__()
        time.sleep(BREAK_S)
        self.__enter__()
        vm.ask("cont")


class Client:
    """Reads the serial port, and connects anew when an update has closed it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ends = False
        self.connections = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(0.2)
                try:
                    sock.connect(self._path)
                    self.connections += 1
                    while not self._ends:
                        try:
                            if not sock.recv(4096):
                                break
                        except TimeoutError:
                            sock.sendall(b"x")
                except OSError:
                    time.sleep(0.01)

    def close(self) -> None:
        self._ends = True
        self._thread.join()


def start(accel: str) -> Vm:
    serial = f"/tmp/cpr-soak-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}.sock"
    vm = Vm(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "64M", "-smp", "1"),
        *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", "file=examples/build/churn.img,format=raw,if=floppy"),
        *("-chardev", f"socket,id=com1,path={serial},server=on,wait=off"),
        *("-serial", "chardev:com1"),
        *("-global", f"migration.x-cpr-exec-timeout={LONG_MS}"),
        timeout=LONG_MS / 1000,
    )
    vm.serial = serial  # type: ignore[attr-defined]
    return vm


def update_once(vm: Vm, kind: str, folder: Path) -> int:
    """One that goes well; for how long the guest stood still, in ns."""
    before = vm.u64(CHURN_PAGES)
    if kind == "early":
        vm.ask("cpr-exec")
    else:
        stream = f"file:{folder}/state"
        command = [*vm.words, "-incoming", stream]
        vm.ask("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        vm.ask("migrate", uri=stream)
    vm.reconnect()
    told = vm.ask("query-migrate")
    assert told["status"] == "completed" and told["x-cpr-update"] == kind, told
    assert vm.ask("query-status")["running"]
    assert vm.u64(CHURN_PAGES) >= before, "the guest's counter went back"
    wait_for_change(lambda: vm.u64(CHURN_PAGES), "the guest goes on")
    assert vm.u64(CHURN_MISMATCHES) == 0, "the guest's memory is wrong"
    return int(told["x-cpr-downtime-ns"])


def settled(vm: Vm) -> dict[str, int]:
    wait_for(lambda: len(vm.processes()) == 1 and not vm.children(), "the guard has ended", SETTLE)
    return {**measure(vm), "files": len(os.listdir(vm.directory))}


def run(accel: str, count: int, turns: Turns) -> bool:
    print(f"{accel}: {count} updates, each third of them failing")
    began = time.monotonic()
    pauses: dict[str, list[int]] = {"early": [], "late": []}
    with tempfile.TemporaryDirectory() as name, start(accel) as vm:
        client, folder = Client(vm.serial), Path(name)  # type: ignore[attr-defined]
        ways = list(commands(folder).values())
        for kind in dict.fromkeys(KINDS):  # the first of each imports what it needs
            one(vm, kind, ways, 0, folder)
        for number in range(len(ways)):
            one(vm, "failing", ways, number, folder)
        samples = [settled(vm)]
        show(0, samples[0])
        for number in range(1, count + 1):
            kind = KINDS[number % len(KINDS)]
            took = one(vm, kind, ways, number, folder)
            if took:
                pauses[kind].append(took)
            turns.over(vm)
            if number % max(1, count // SAMPLES) == 0:
                samples.append(settled(vm))
                show(number, samples[-1])
        client.close()
        os.unlink(vm.serial)  # type: ignore[attr-defined]
    flat = is_flat(samples)
    for each in pauses.items():
        tell_pauses(*each)
    word = "flat" if flat else "NOT FLAT"
    took_s = time.monotonic() - began
    print(f"{accel}: {word}; {client.connections} connections of the client; {took_s:.0f} s")
    return flat


def one(vm: Vm, kind: str, ways: list[tuple[list[str], bool]], number: int, folder: Path) -> int:
    if kind != "failing":
        return update_once(vm, kind, folder)
    command, late = ways[number // 2 % len(ways)]
    vm.ask("migrate-set-parameters", x_cpr_exec_timeout=DEADLINE_MS)
    fail_once(vm, command, late, folder)
    vm.ask("migrate-set-parameters", x_cpr_exec_timeout=LONG_MS)
    return 0


def is_flat(samples: list[dict[str, int]]) -> bool:
    """An image that has just started has other mappings than one that has gone on for long, so the
    least of the last half is compared with the most of the first."""
    half = (len(samples) + 1) // 2
    allowed, flat = {"rss": MOST_GROWTH}, True
    for key in samples[0]:
        before = max(each[key] for each in samples[:half])
        after = min(each[key] for each in samples[half:])
        if after > before + allowed.get(key, 0):
            print(f"  {key} grow from {before} to {after}")
            flat = False
    return flat


def tell_pauses(kind: str, values: list[int]) -> None:
    """On a machine that does something else besides, they tell of that."""
    share = max(1, len(values) // 10)
    first, last = (statistics.median(part) / 1e6 for part in (values[:share], values[-share:]))
    print(f"  pause of {kind} updates: first tenth {first:.2f} ms, last tenth {last:.2f} ms")


def run_many(accel: str, count: int) -> bool:
    """Ten VMs, each updated so often, at the same time."""
    began, failures = time.monotonic(), list[str]()

    def update(number: int) -> None:
        try:
            with tempfile.TemporaryDirectory() as name, start(accel) as vm:
                for done in range(count):
                    update_once(vm, "early" if done % 2 else "late", Path(name))
                settled(vm)
                os.unlink(vm.serial)  # type: ignore[attr-defined]
        except Exception as error:
            failures.append(f"VM {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=update, args=(number,)) for number in range(MANY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        print(f"  {failure}")
    took = time.monotonic() - began
    word = "nothing lost" if not failures else "FAILED"
    print(f"{accel}: {MANY} VMs at once, {count} updates each: {word}; {took:.0f} s")
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=1000, help="updates of each VM")
    parser.add_argument("--accel", nargs="*", default=["kvm", "tcg"])
    parser.add_argument("--lock", metavar="FILE", help="run only with a shared lock on it")
    words = parser.parse_args()
    os.chdir(Path(__file__).parents[2])
    good, turns = [], Turns(words.lock)
    for accel in words.accel:
        with turns:
            good.append(run(accel, words.n, turns))
        with turns:
            good.append(run_many(accel, max(2, words.n // 100)))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
