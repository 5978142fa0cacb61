"""A terminal in whose background this process may be.

There SIGTTOU (`stty tostop`) would stop a process that writes, and with it its guest, which is
worse than a line in the wrong place.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import os


def write(fd: int, data: bytes | memoryview) -> int:
    """As os.write, from the background too."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        return os.write(fd, data)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
