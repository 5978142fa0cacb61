"""A network of a thread's own, with a tap for a guest."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h
HOST, GUEST = "10.7.0.1", "10.7.0.2"
SECONDS = 60


def own_network(*tap_options: str) -> None:
    """Gives this thread, and what it starts, a network with nothing but tap0, which has HOST.

    `tap_options` are ip-tuntap's.  Raises RuntimeError where that is not possible here.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise RuntimeError(f"unshare of the network: {os.strerror(ctypes.get_errno())}")
    if not Path("/dev/net/tun").exists():
        raise RuntimeError("this host has no /dev/net/tun")
    if shutil.which("ip") is None:
        raise RuntimeError("there is no ip(8): install iproute2")
    for command in (
        ["ip", "tuntap", "add", "dev", "tap0", "mode", "tap", *tap_options],
        ["ip", "addr", "add", f"{HOST}/24", "dev", "tap0"],
        ["ip", "link", "set", "tap0", "up"],
    ):
        subprocess.run(command, check=True, timeout=SECONDS)
