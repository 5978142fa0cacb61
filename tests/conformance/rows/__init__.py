"""The rows, a module for each part of the behaviour."""

from __future__ import annotations

from ..row import Row
from . import (
    channels,
    chardevs,
    cpr_state,
    failed_exec,
    incoming,
    linux,
    memory,
    migrate,
    order,
    other_side,
    parameters,
    process,
    reboot,
    stream,
    switchover,
    terminal,
    transfer,
    updates,
    with_capability,
)

ROWS: list[Row] = [
    *process.ROWS,
    *cpr_state.ROWS,
    *memory.ROWS,
    *chardevs.ROWS,
    *stream.ROWS,
    *updates.ROWS,
    *switchover.ROWS,
    *parameters.ROWS,
    *terminal.ROWS,
    *migrate.ROWS,
    *order.ROWS,
    *with_capability.ROWS,
    *other_side.ROWS,
    *channels.ROWS,
    *incoming.ROWS,
    *failed_exec.ROWS,
    *transfer.ROWS,
    *reboot.ROWS,
    *linux.ROWS,
]
"""In the order of the parts, as far as a module belongs to one part of it."""
