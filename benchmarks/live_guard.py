"""The two guards of cpr.live beside each other, for heaps of several sizes.

usage: python -m benchmarks.live_guard [--repeat N]

An early update whose new program ends at once tells how long the caller stands still at the exec,
and how long it takes to write to each page of its heap for the first time after it.  A late update
tells how long nothing runs in all, from the call to the new program's `ready`.  The table, of
medians, goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.vm import ROOT

HEAPS = (0, 300, 1024)  # MiB
GUARDS = ("fork", "vm")
COLUMNS = ("early: stands still", "early: first writes to the heap after", "late: stands still")
PROGRAM = """
import json, mmap, sys, time
from cpr import live
guard, size, repeat = sys.argv[1], int(sys.argv[2]) << 20, int(sys.argv[3])
if live.generation:
    began, words = live.state()
    live.ready()
    print(json.dumps([*words, time.monotonic_ns() - began]))
    raise SystemExit
heap = bytearray(size)

def touch():
    began = time.monotonic_ns()
    for place in range(0, size, mmap.PAGESIZE):
        heap[place] = 1
    return time.monotonic_ns() - began

touch()
plain = touch()
stalls, writes = [], []
live.on_resume(lambda: stalls.append(time.monotonic_ns() - began))
live.ready()
for number in range(repeat):
    began = time.monotonic_ns()
    try:
        live.update(["/bin/false"], guard=guard)
    except live.UpdateError:
        writes.append(touch() - plain)
live.on_save(lambda: (began, [stalls[-repeat:], writes]))
began = time.monotonic_ns()
live.update(mode="late", guard=guard)
"""


def measure(guard: str, heap: int, repeat: int) -> list[float]:
    """Milliseconds, one for each of COLUMNS."""
    stalls: list[int] = []
    writes: list[int] = []
    lates: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(PROGRAM)
        for _ in range(repeat):
            out = subprocess.run(
                [sys.executable, str(path), guard, str(heap), str(repeat)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                check=False,  # it is in another process since the first update that has failed
            ).stdout
            found = json.loads(out)
            stalls += found[0]
            writes += found[1]
            lates.append(found[2])
    return [statistics.median(each) / 1e6 for each in (stalls, writes, lates)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=5, help="of each measurement (5)")
    repeat = parser.parse_args().repeat
    print("| heap | guard |", " | ".join(COLUMNS), "|")
    print("|---|---|---|---|---|")
    for heap in HEAPS:
        for guard in GUARDS:
            times = measure(guard, heap, repeat)
            print(f"| {heap} MiB | {guard} |", *(f"{each:.1f} ms |" for each in times), flush=True)


if __name__ == "__main__":
    main()
