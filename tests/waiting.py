"""Waiting for something that a guest does, without a fixed sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

SLOW = 8.0 if "CPR_NESTED" in os.environ else 1.0  # the nested VM's one CPU is emulated, and shared
TIMEOUT = 20.0 * SLOW
ACCEPTS_CONNECTIONS = 1 << 16  # __SO_ACCEPTCON in the flags of /proc/net/unix (linux/net.h)


def wait_for(condition: Callable[[], object], what: str, seconds: float = TIMEOUT) -> None:
    """Polls until `condition()` is true; fails naming `what` after `seconds`.

    The longer it has waited the more seldom it looks, which takes time from what it waits for.
    """
    begin = time.monotonic()
    while not condition():
        waited = time.monotonic() - begin
        assert waited < seconds, f"timed out: {what}"
        time.sleep(min(max(waited / 10, 0.002), 0.05))


def is_listening(path: str) -> bool:
    """Whether a unix socket listens at `path`: a bound one alone refuses connections."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if words[-1] == path and int(words[3], 16) & ACCEPTS_CONNECTIONS:
            return True
    return False


def wait_for_change(read: Callable[[], int], what: str, steps: int = 1) -> int:
    """Waits until `read()` has changed `steps` times; returns its value then."""
    for _ in range(steps):
        before = read()
        wait_for(lambda before=before: read() != before, what)  # type: ignore[misc]
    return read()
