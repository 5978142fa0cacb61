"""The rows, a module for each part of the behaviour."""

from __future__ import annotations

from ..row import Row
from . import (
    channels,
    chardevs,
    cpr_state,
    failed_exec,
    incoming,
    migrate,
    parameters,
    process,
    reboot,
    stream,
    terminal,
    transfer,
    updates,
)

ROWS: list[Row] = [
    *process.ROWS,
    *cpr_state.ROWS,
    *chardevs.ROWS,
    *stream.ROWS,
    *updates.ROWS,
    *parameters.ROWS,
    *terminal.ROWS,
    *migrate.ROWS,
    *channels.ROWS,
    *incoming.ROWS,
    *failed_exec.ROWS,
    *transfer.ROWS,
    *reboot.ROWS,
]
"""In the order of FACTS, as far as a module belongs to one part of it."""
