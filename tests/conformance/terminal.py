"""A terminal that a VMM has its monitor on, and what stands on its screen."""

from __future__ import annotations

import os
import re
import select
import termios
import time

from .match import Mismatch
from .process import DEADLINE

ESCAPE = re.compile(r"\x1b\[(\d*)([A-Z])")


def render(data: bytes) -> list[str]:
    """The lines of an endlessly wide screen after `data`: CR, LF, BS and the cursor escapes."""
    lines: list[list[str]] = [[]]
    column = 0
    text = data.decode(errors="replace")
    position = 0
    while position < len(text):
        escape = ESCAPE.match(text, position)
        if escape:
            count = int(escape[1] or 1)
            if escape[2] == "D":
                column = max(column - count, 0)
            elif escape[2] == "C":
                column += count
            elif escape[2] == "K":
                del lines[-1][column:]
            position = escape.end()
            continue
        character = text[position]
        position += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            lines.append([])
        elif character == "\b":
            column = max(column - 1, 0)
        else:
            lines[-1] += [" "] * (column - len(lines[-1]))
            lines[-1][column : column + 1] = [character]
            column += 1
    return ["".join(line) for line in lines]


class Terminal:
    """The master side of a pty; `slave` is the name of the other one."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        os.set_inheritable(self._master, False)
        self.slave = os.ttyname(self._slave)
        self.data = b""

    def files(self) -> list[tuple]:
        """The file actions that make it a process's stdin and stdout."""
        return [
            (os.POSIX_SPAWN_DUP2, self._slave, 0),
            (os.POSIX_SPAWN_DUP2, self._slave, 1),
        ]

    def local_flags(self) -> int:
        return int(termios.tcgetattr(self._slave)[3])

    def type(self, line: str) -> None:
        """Types a line.  Waits for its echo, as a person would."""
        os.write(self._master, line.encode())
        self.wait_for(lambda lines: lines[-1].endswith(line))
        os.write(self._master, b"\r")

    def wait_for(self, seen, what: str = "the screen") -> list[str]:  # type: ignore[no-untyped-def]
        """Reads until `seen(lines)` is true of what stands on the screen; returns the lines."""
        deadline = time.monotonic() + DEADLINE
        while not seen(lines := render(self.data)):
            left = deadline - time.monotonic()
            if not select.select([self._master], [], [], max(left, 0))[0]:
                raise Mismatch(f"{what}: only {lines[-6:]} came")
            try:
                self.data += os.read(self._master, 1 << 16)
            except OSError:
                raise Mismatch(f"{what}: the terminal was closed after {lines[-6:]}") from None
        return lines

    def close(self) -> None:
        os.close(self._master)
        os.close(self._slave)
