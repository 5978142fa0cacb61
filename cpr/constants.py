"""Numbers and names that several layers share."""

from __future__ import annotations

PAGE_SIZE = 4096  # of x86
MIB = 1 << 20
GIB = 1 << 30
U32_LIMIT = 1 << 32
U64_LIMIT = 1 << 64

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
MS_PER_S = 1_000

# What stands after a size, in either case, and the power of two by which it multiplies.
SIZE_SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}

STDIN, STDOUT, STDERR = 0, 1, 2

MAX_CPUS = 255  # of QEMU's machine pc

# QEMU's migration modes.
MODES = NORMAL, REBOOT, TRANSFER, EXEC = "normal", "cpr-reboot", "cpr-transfer", "cpr-exec"

PROGRAM = "cpr-vmm 0.1.0"  # what this program calls itself, to clients and to another image
