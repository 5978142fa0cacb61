"""The table itself: no name twice, no restriction without a row, no row without an end."""

from __future__ import annotations

from collections import Counter

import pytest

from .facts import RESTRICTIONS
from .rows import ROWS


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(row.id for row in ROWS).items() if count > 1] == []


@pytest.mark.parametrize("line", RESTRICTIONS)
def test_line_has_a_row(line: str) -> None:
    assert [row.id for row in ROWS if row.source.startswith(f"4: {line}")]


def test_sources_are_lines() -> None:
    lines = tuple(f"4: {line}" for line in RESTRICTIONS)
    restrictions = [row.source for row in ROWS if row.source.startswith("4:")]
    assert [source for source in restrictions if not source.startswith(lines)] == []


@pytest.mark.parametrize("name", ["qemu", "cpr"])
def test_every_row_looks_at_something(name: str) -> None:
    assert [row.id for row in ROWS if len(row.steps(name)) < 2] == []
