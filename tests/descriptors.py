"""The descriptors of the process that runs the tests."""

from __future__ import annotations

import gc
import os


def open_fds() -> list[str]:
    """Their numbers, and that of the folder; without those that an earlier test has dropped."""
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))
