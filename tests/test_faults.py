"""A fault in every step of every way to update: the guest goes on, or ended with its process."""

from __future__ import annotations

import os

import pytest
from conftest import ROOT
from doc_tables import Document
from faults.steps import FAULTS, ROWS, Row
from faults.table import cells
from faults.trial import Trial

ALL = [(row, fault) for row in ROWS for fault in FAULTS]
SAMPLE = {
    ("early", "exec", "fail"),
    ("early", "hand-over", "fail"),
    ("early", "load", "kill"),
    ("early", "commit", "fail"),
    ("early", "resume", "fail"),
    ("early", "stop", "fail"),
    ("early", "save", "kill"),
    ("late", "save", "fail"),
    ("late", "finish", "fail"),
    ("late", "commit", "kill"),
    ("refused", "give-back", "fail"),
    ("staging", "last-pass", "fail"),
    ("rehearsal", "map", "kill"),
    ("transfer", "load", "fail"),
    ("transfer", "given-away", "fail"),
    ("reboot", "devices", "fail"),
}
"""What the default run takes; the whole is `make faults`."""


def name(row: Row, fault: str) -> str:
    return f"{row.way}-{row.step}-{fault}".replace(" ", "-")


def chosen(row: Row, fault: str) -> bool:
    return bool(os.environ.get("ALL_FAULTS")) or (row.way, row.step, fault) in SAMPLE


@pytest.mark.parametrize(
    ("row", "fault"),
    [pytest.param(*each, id=name(*each)) for each in ALL if chosen(*each)],
)
def test_fault(start, accel, tmp_path, row, fault):
    assert Trial(start, accel, row, fault, tmp_path).run() == row.outcome(fault)


def test_the_table_is_that_of_the_document():
    document = Document(ROOT / "docs" / "reliability.md")
    assert document.rows("Faults of every step") == cells()
