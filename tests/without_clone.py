"""Executes a command under a seccomp filter that refuses clone() of processes that share memory.

clone3(), with which libc makes threads, is left alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

# linux/filter.h, linux/seccomp.h, linux/prctl.h, asm/unistd_64.h
LD_W_ABS, JEQ, JSET, RET = 0x20, 0x15, 0x45, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SYS_CLONE, CLONE_VM, CLONE_THREAD = 56, 0x100, 0x10000
SYS_PIDFD_SEND_SIGNAL = 424
NUMBER_AT, FLAGS_AT = 0, 16

PROGRAM = (
    (LD_W_ABS, 0, 0, NUMBER_AT),
    (JEQ, 0, 4, SYS_CLONE),
    (LD_W_ABS, 0, 0, FLAGS_AT),
    (JSET, 0, 2, CLONE_VM),
    (JSET, 1, 0, CLONE_THREAD),
    (RET, 0, 0, ERRNO | errno.EPERM),
    (RET, 0, 0, ALLOW),
)


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]


def refusing(number: int, error: int) -> tuple[tuple[int, int, int, int], ...]:
    """A filter with which that system call fails."""
    return (
        (LD_W_ABS, 0, 0, NUMBER_AT),
        (JEQ, 0, 1, number),
        (RET, 0, 0, ERRNO | error),
        (RET, 0, 0, ALLOW),
    )


def install(instructions: tuple[tuple[int, int, int, int], ...]) -> None:
    """This process, and what it becomes, has that filter."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program = Filter(len(instructions), code)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    install(PROGRAM)
    os.execvp(sys.argv[1], sys.argv[1:])
