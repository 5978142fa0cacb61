"""Ten updates of the heartbeat guest under an observer process: `python -m benchmarks.demo`."""

from __future__ import annotations

import statistics
import sys
import time

from harness.vm import HEARTBEAT, Vm

from benchmarks.observer import Observer

UPDATES = 10
SETTLE = 0.25


def main() -> int:
    """Prints PID, counter and pause of each update; 1 if the guest did not survive one."""
    with (
        Vm("examples/heartbeat.cfg", "-monitor", "none", *sys.argv[1:]) as vm,
        Observer(vm.ram_path()) as observer,
    ):
        time.sleep(SETTLE)
        baseline = observer.window_of(SETTLE)
        first = vm.u32(HEARTBEAT)
        print(f"PID {vm.pid}, counter {first}, RAM {len(vm.ram) >> 20} MiB")
        pauses = []
        for number in range(1, UPDATES + 1):
            before = vm.u32(HEARTBEAT)
            vm.update()
            time.sleep(SETTLE)
            window = observer.window()
            after = vm.u32(HEARTBEAT)
            if vm.process.poll() is not None or after == before:
                print(f"update {number}: the guest did not go on: {vm.stderr}")
                return 1
            pauses.append(window.milliseconds)
            print(
                f"update {number:2}: PID {vm.process.pid}, counter {before} -> {after}, "
                f"pause {pauses[-1]:.1f} ms"
            )
        print(
            f"pause: median {statistics.median(pauses):.1f} ms, max {max(pauses):.1f} ms; "
            f"longest gap without an update {baseline.milliseconds:.1f} ms; "
            f"counter went back {observer.backwards} times"
        )
        return 1 if observer.backwards else 0


if __name__ == "__main__":
    sys.exit(main())
