"""Runs the table and prints it, a column for each VMM: `python -m tests.conformance`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from .match import Mismatch, Unavailable
from .options import OPTIONS, targets
from .row import Row
from .rows import ROWS
from .target import Target

ID_WIDTH = max(len(row.id) for row in ROWS)
RESULT_WIDTH = 6
PASS, FAIL, SKIP = "pass", "FAIL", "skip"


HEADING = """# Conformance

Each row is a test that passes on this VMM and on a real QEMU 11.1.3 (`make conformance
QEMU=COMMAND` runs both side by side). The number is the part of QEMU's behaviour: 1 the CPR state
and the new process, 2 the migration stream, 3 the monitors, 4 restrictions and failures, 5
cpr-transfer and cpr-reboot. A star marks where the two differ on purpose, as differences.md says.
This file is what `python -m tests.conformance --list` prints.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    for name, help_text in OPTIONS.items():
        parser.add_argument(name, help=help_text, metavar=name[2:].upper())
    parser.add_argument("-k", metavar="WORD", default="", help="only rows with WORD in their name")
    parser.add_argument("--list", action="store_true", help="print the rows as a Markdown table")
    options = parser.parse_args(arguments)
    if not (options.vmm or options.qemu or options.list):
        parser.error("name a VMM with --vmm or --qemu")
    return options


def print_list(rows: list[Row]) -> None:
    """The rows as a Markdown table; a star where the two VMMs differ on purpose."""
    print(HEADING)
    print("| row | what QEMU 11.1.3 does | differs |\n|---|---|---|")
    for row in rows:
        source = row.source.replace("|", r"\|")
        print(f"| `{row.id}` | {source} | {'*' if row.differs else ''} |")


def run(row: Row, target: Target) -> tuple[str, str]:
    """The result of one row, and what is to be said about it."""
    try:
        row.run(target)
    except Mismatch as mismatch:
        return FAIL, f"{target.name}: {mismatch}"
    except Unavailable as lack:
        return SKIP, f"{target.name}: {row.id}: needs {lack}"
    return PASS, ""


def run_all(rows: list[Row], found: list[Target]) -> int:
    """Prints a line for each row as it is done, then what failed, then the counts."""
    counts = {target.name: Counter[str]() for target in found}
    texts: list[str] = []
    started = time.monotonic()
    names = "".join(f"{target.name:{RESULT_WIDTH}}" for target in found)
    print(f"{'row':{ID_WIDTH}}  {names}behaviour  (*: they differ on purpose)")
    with ThreadPoolExecutor(len(found)) as pool:
        for row in rows:
            results = list(pool.map(run, [row] * len(found), found))
            for target, (result, text) in zip(found, results, strict=True):
                counts[target.name][result] += 1
                texts += [text] if text else []
            columns = "".join(f"{result:{RESULT_WIDTH}}" for result, _ in results)
            print(f"{row.id:{ID_WIDTH}}  {columns}{'* ' * row.differs}{row.source}", flush=True)
    for text in texts:
        print(f"\n{text}")
    print()
    for name, count in counts.items():
        print(f"{name}: {count[PASS]} pass, {count[FAIL]} fail, {count[SKIP]} skip")
    print(f"{len(rows)} rows in {time.monotonic() - started:.0f} s")
    return int(any(count[FAIL] for count in counts.values()))


def main(arguments: list[str]) -> int:
    """0 where all rows passed on each VMM, or could not be run on this machine; 1 otherwise."""
    options = parse(arguments)
    rows = [row for row in ROWS if options.k in row.id]
    if options.list:
        print_list(rows)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with targets(options.vmm, options.qemu, options.root) as found:
        return run_all(rows, found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
