"""The real QEMU beside which is measured."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass

OLDEST = (10, 2)


@dataclass(frozen=True)
class Peer:
    """A real QEMU: its command, the folder that it has as its root ("" for none), its version."""

    command: list[str]
    root: str
    version: str

    def inside(self, path: object) -> str:
        """A path as QEMU sees it."""
        return str(path).removeprefix(self.root)

    def own_words(self, words: list[str]) -> list[str]:
        """A command line as QEMU itself was given it: without how to get into its root."""
        return words[len(self.command) - 1 :]


def parse_peer(text: str) -> Peer:
    """`/usr/bin/qemu-system-x86_64`, or `chroot FOLDER qemu-system-x86_64`.

    Raises ValueError where it cannot be run, or is older than cpr-exec.
    """
    words = shlex.split(text)
    if not words:
        raise ValueError("--qemu: name a qemu-system-x86_64, or 'chroot FOLDER QEMU'")
    try:
        run = subprocess.run(
            [*words, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--qemu: cannot run '{text}': {error}") from None
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)\S*", run.stdout)
    if found is None:
        problem = (run.stderr or run.stdout).strip().splitlines() or ["it says nothing"]
        raise ValueError(f"--qemu: '{text} --version' is not QEMU's: {problem[-1]}")
    version = found[0].removeprefix("QEMU emulator version ")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise ValueError(f"--qemu: QEMU {version} has no cpr-exec: give one of 10.2 or later")
    is_chroot = os.path.basename(words[0]) == "chroot"
    return Peer(words, os.path.abspath(words[1]) if is_chroot else "", version)
