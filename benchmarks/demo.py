"""Ten updates of the heartbeat guest under an observer process: `python -m benchmarks.demo`."""

from __future__ import annotations

import statistics
import sys
import time

from benchmarks.observer import HEARTBEAT, Observer
from benchmarks.vm import Vm

UPDATES = 10
SETTLE = 0.25


def main() -> int:
    """Prints PID, counter and pause of each update; 1 if the guest did not survive one."""
    with Vm("examples/heartbeat.cfg", "-monitor", "none", *sys.argv[1:]) as vm:
        pid = vm.pid
        observer = Observer(vm.ram_path())
        time.sleep(SETTLE)
        baseline = observer.longest_since(0)
        first = vm.u32(HEARTBEAT)
        print(f"PID {pid}, counter {first}, RAM {len(vm.ram) >> 20} MiB")
        pauses = []
        for number in range(1, UPDATES + 1):
            before = vm.u32(HEARTBEAT)
            start = time.monotonic_ns()
            vm.update()
            time.sleep(SETTLE)
            gap = observer.longest_since(start)
            after = vm.u32(HEARTBEAT)
            if gap is None or vm.process.poll() is not None or after == before:
                print(f"update {number}: the guest did not go on: {vm.stderr}")
                return 1
            pauses.append(gap.length_ns / 1e6)
            print(
                f"update {number:2}: PID {vm.process.pid}, counter {before} -> {after}, "
                f"pause {pauses[-1]:.1f} ms"
            )
        observer.stop()
        no_update = baseline.length_ns / 1e6 if baseline else 0.0
        print(
            f"pause: median {statistics.median(pauses):.1f} ms, max {max(pauses):.1f} ms; "
            f"longest gap without an update {no_update:.1f} ms; "
            f"counter went back {observer.backwards} times"
        )
        return 1 if observer.backwards else 0


if __name__ == "__main__":
    sys.exit(main())
