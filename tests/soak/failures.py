"""N failing updates in a row of one VMM whose guest is under load: `make soak-failures N=1000`.

Programs that fail in five ways take turns, early and late.  After each the guest's counters are
monotone and its memory is right, and the monitor answers; the process is measured now and then.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from failing import bad, script  # noqa: E402
from harness.vm import Vm  # noqa: E402
from waiting import wait_for, wait_for_change  # noqa: E402

CHURN_ROUND, CHURN_MISMATCHES, CHURN_PAGES = 0x9018, 0x9020, 0x9028
DEADLINE_MS = 250
SAMPLES = 10
SETTLE = 60.0  # s
MOST_GROWTH = 8 << 20  # bytes of memory over the whole run


def commands(folder: Path) -> dict[str, tuple[list[str], bool]]:
    """The name of each way to fail, its command, and whether it is a late update."""
    missing = script(folder, "#!/nonexistent/interpreter\n")
    return {
        "false": (["false"], True),
        "exit": (bad("exit"), False),
        "killed": (["sh", "-c", "kill -9 $$"], True),
        "killed early": (bad("die"), False),
        "hang": (["sh", "-c", "exec sleep 1000"], True),
        "hang early": (bad("hang"), False),
        "import": ([sys.executable, "-c", "import no_such_module"], True),
        "import early": (bad("import"), False),
        "interpreter": ([missing], True),
        "before commit": (bad("die-before-commit"), False),
    }


def start(accel: str) -> Vm:
    return Vm(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "64M", "-smp", "1"),
        *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", "file=examples/build/churn.img,format=raw,if=floppy"),
        *("-global", f"migration.x-cpr-exec-timeout={DEADLINE_MS}"),
    )


def measure(vm: Vm) -> dict[str, int]:
    process = psutil.Process(vm.follow())
    return {
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "mappings": len(Path(f"/proc/{vm.pid}/maps").read_text().splitlines()),
        "rss": process.memory_info().rss - process.memory_info().shared,
        "children": len(process.children()),
    }


def fail_once(vm: Vm, command: list[str], late: bool, folder: Path) -> None:
    """One update, until the guest goes on in the old image."""
    before = vm.u64(CHURN_PAGES)
    if late:
        full = [*command, "-incoming", f"file:{folder}/state"]
        vm.ask("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=full)
        vm.ask("migrate", uri=f"file:{folder}/state")
    else:
        vm.ask("cpr-exec", command=command)

    def settled() -> bool:
        return bool(vm.ask("query-migrate").get("status") == "failed")

    wait_for(settled, f"{command} has failed", SETTLE)
    assert vm.ask("query-status")["running"]
    assert vm.u64(CHURN_PAGES) >= before, "the guest's counter went back"
    wait_for_change(lambda: vm.u64(CHURN_PAGES), "the guest goes on")
    assert vm.u64(CHURN_MISMATCHES) == 0


def run(accel: str, count: int) -> bool:
    """Prints the figures; whether they are flat."""
    print(f"{accel}: {count} failing updates, deadline {DEADLINE_MS} ms")
    began = time.monotonic()
    with start(accel) as vm, tempfile.TemporaryDirectory() as name:
        ways = list(commands(Path(name)).items())
        for way, (command, late) in ways:  # the first of each imports what it needs
            fail_once(vm, command, late, Path(name))
            print(f"  {way}: {vm.ask('query-migrate')['error-desc']}")
        samples = [measure(vm)]
        show(0, samples[0])
        for number in range(1, count + 1):
            _, (command, late) = ways[number % len(ways)]
            fail_once(vm, command, late, Path(name))
            if number % max(1, count // SAMPLES) == 0:
                samples.append(measure(vm))
                show(number, samples[-1])
        rounds = vm.u64(CHURN_ROUND)
    first, last = samples[0], samples[-1]
    flat = all(
        last[key] <= first[key] + (MOST_GROWTH if key == "rss" else 4 if key == "mappings" else 0)
        for key in first
    )
    took = time.monotonic() - began
    print(f"{accel}: {'flat' if flat else 'NOT FLAT'}; {rounds} rounds of the guest; {took:.0f} s")
    return flat


def show(number: int, figures: dict[str, int]) -> None:
    text = ", ".join(f"{key} {value}" for key, value in figures.items())
    print(f"  after {number}: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=1000, help="failing updates of each VMM")
    parser.add_argument("--accel", nargs="*", default=["kvm", "tcg"])
    words = parser.parse_args()
    os.chdir(Path(__file__).parents[2])
    return 0 if all([run(accel, words.n) for accel in words.accel]) else 1


if __name__ == "__main__":
    sys.exit(main())
