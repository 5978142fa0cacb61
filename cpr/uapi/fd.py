"""Descriptors, and the one place that calls ioctl."""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib
from cpr.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Fd:
    """Owns one descriptor, close-on-exec, until `close` or `release`."""

    __slots__ = ("name", "number")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name

    def fileno(self) -> int:
        return self.number

    def ioctl(self, request: int, operation: str, argument: Any = 0, remedy: str = "") -> int:
        """Calls ioctl with a cdata pointer or an int and returns its result (>= 0).

        Raises KernelError naming `operation` and the descriptor.
        """
        if isinstance(argument, int):
            argument = ffi.cast("unsigned long", argument)
        result = lib.ioctl(self.number, request, argument)
        if result < 0:
            raise KernelError(f"{operation} on {self.name}", ffi.errno, remedy)
        return result

    def release(self) -> int:
        """Gives the descriptor to the caller, who closes it from now on."""
        number, self.number = self.number, -1
        return number

    def close(self) -> None:
        if self.number >= 0:
            os.close(self.release())


def same_file(first: int, second: int) -> bool:
    """Whether two descriptors of this process are one open file, as copies of each other are."""
    if first == second:
        return True
    pid = ffi.cast("long", os.getpid())
    arguments = (ffi.cast("unsigned long", number) for number in (first, second))
    kind = ffi.cast("long", lib.KCMP_FILE)
    return bool(lib.syscall(lib.SYS_kcmp, pid, pid, kind, *arguments) == 0)
