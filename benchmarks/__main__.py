"""`python -m benchmarks`: the pause of an update against RAM size and page size, as a table.

Every figure is what the observer process saw.  With --qemu each case of QEMU runs right after the
same case of ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from itertools import product

from benchmarks.pause import MIB, Case, Peer, Result, measure, parse_peer

UNITS = {"M": 1, "G": 1024}


def size(text: str) -> int:
    """Bytes of a size such as 256M or 4G."""
    return int(text[:-1]) * UNITS[text[-1].upper()] * MIB


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--ram", default="64M,256M,1G", help="sizes (default %(default)s)")
    parser.add_argument("--pages", default="4K,2M", help="page sizes (default %(default)s)")
    parser.add_argument("--accel", default="kvm,tcg", help="accelerators (default %(default)s)")
    parser.add_argument("--prealloc", action="store_true", help="with prealloc=on as well")
    parser.add_argument("--updates", type=int, default=10, help="updates of each case")
    parser.add_argument("--qemu", help="a QEMU >= 10.2 to measure beside, or 'chroot DIR QEMU'")
    parser.add_argument("--json", help="write all the pauses to this file")
    return parser.parse_args()


def cases(options: argparse.Namespace, peer: Peer | None) -> list[Case]:
    accels, rams = options.accel.split(","), [size(each) for each in options.ram.split(",")]
    backings = (False, True) if options.prealloc else (False,)
    vmms = ("cpr", "qemu") if peer else ("cpr",)
    grid = product(accels, rams, options.pages.split(","), backings, vmms)
    return [Case(vmm, accel, ram, pages, backing) for accel, ram, pages, backing, vmm in grid]


def row(result: Result) -> str:
    case = result.case
    head = f"| {case.vmm} | {case.accel} | {case.ram // MIB} MiB | {case.pages} | "
    head += f"{'prealloc' if case.prealloc else 'lazy'} | "
    if result.skipped:
        return f"{head}left out: {result.skipped} | | | |"
    return (
        f"{head}{result.median:.1f} | {result.p99:.1f} | {max(result.pauses):.1f} | "
        f"{result.baseline:.1f} |"
    )


def main() -> int:
    options = parse_arguments()
    peer = parse_peer(options.qemu) if options.qemu else None
    results = []
    print("| VMM | accel | RAM | pages | backing | median ms | p99 ms | max ms | no update ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases(options, peer):
        if sys.stderr.isatty():
            print(f"\r{case.label} …\033[K", end="", file=sys.stderr)
        results.append(measure(case, options.updates, peer))
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(row(results[-1]), flush=True)
    if options.json:
        document = {
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cases": [
                {**vars(r.case), "pauses_ms": r.pauses, "skipped": r.skipped} for r in results
            ],
        }
        with open(options.json, "w") as file:
            json.dump(document, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
