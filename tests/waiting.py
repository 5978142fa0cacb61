"""Waiting for something that a guest does, without a fixed sleep."""

from __future__ import annotations

import time
from collections.abc import Callable

TIMEOUT = 20.0


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Polls until `condition()` is true; fails naming `what` after TIMEOUT seconds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.002)


def wait_for_change(read: Callable[[], int], what: str, steps: int = 1) -> int:
    """Waits until `read()` has changed `steps` times; returns its value then."""
    for _ in range(steps):
        before = read()
        wait_for(lambda before=before: read() != before, what)  # type: ignore[misc]
    return read()
