"""Each row, on each VMM that the command line names."""

from __future__ import annotations

import pytest

from .match import Unavailable
from .row import Row
from .rows import ROWS
from .target import Target

BOOTED_ELSEWHERE = ("linux-prompt",)  # by test_linux.py, on this VMM, which takes 10 s


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.id not in BOOTED_ELSEWHERE], ids=lambda row: row.id
)
def test_row(row: Row, target: Target) -> None:
    try:
        row.run(target)
    except Unavailable as lack:
        pytest.skip(str(lack))
