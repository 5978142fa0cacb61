"""Numbers and names that several layers share."""

from __future__ import annotations

PAGE_SIZE = 4096  # of x86
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
U32_LIMIT = 1 << 32
U64_LIMIT = 1 << 64

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
MS_PER_S = 1_000
US_PER_S = 1_000_000

# What stands after a size, in either case, and the power of two by which it multiplies.
SIZE_SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}

MAX_FILE_OFFSET = (1 << 63) - 1
UNIX_PATH_MAX = 108  # sizeof(sockaddr_un.sun_path), unix(7)

STDIN, STDOUT, STDERR = 0, 1, 2

INIT = 1  # the PID that orphans become children of, and with which a PID namespace ends

MAX_CPUS = 255  # of QEMU's machine pc

# QEMU's migration modes.
MODES = NORMAL, REBOOT, TRANSFER, EXEC = "normal", "cpr-reboot", "cpr-transfer", "cpr-exec"

PROGRAM = "cpr-vmm"  # what this program calls itself
VERSION = "0.1.0"
PROGRAM_VERSION = f"{PROGRAM} {VERSION}"  # to clients and to another image
QEMU_VERSION = "11.1.3"  # clients go by it: the behaviour is that of this QEMU
SECCOMP_FILTER = "Seccomp:\t2\n"  # SECCOMP_MODE_FILTER of linux/seccomp.h, in proc_pid_status(5)
