"""The table of docs/reliability.md: `python -m tests.faults.table` prints it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from faults.steps import FAULTS, ROWS  # noqa: E402

HEADER = ["way", "step", "whose", "what", *FAULTS]


def cells() -> list[list[str]]:
    return [
        [row.way, row.step, row.side, row.what, *(row.outcome(fault) for fault in FAULTS)]
        for row in ROWS
    ]


def table() -> str:
    lines = [HEADER, ["---"] * len(HEADER), *cells()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")
