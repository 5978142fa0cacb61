"""Each row, on each VMM that the command line names."""

from __future__ import annotations

import pytest

from .match import Unavailable
from .row import Row
from .rows import ROWS
from .target import Target


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row(row: Row, target: Target) -> None:
    try:
        row.run(target)
    except Unavailable as lack:
        pytest.skip(str(lack))
