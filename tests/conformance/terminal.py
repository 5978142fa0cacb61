"""A terminal that a VMM has its monitor on, and what stands on its screen."""

from __future__ import annotations

import os
import re
import select
import termios
import time
from collections.abc import Callable

from .match import OWN_LINES, Mismatch
from .process import DEADLINE

TOKEN = re.compile(r"\x1b\[(?P<count>\d*)(?P<letter>[A-Z])|(?P<text>[^\x1b\r\n\b]+)|[\r\n\b]")
READ_SIZE = 1 << 16


class Screen:
    """The lines of an endlessly wide screen: text, CR, LF, BS and the cursor escapes."""

    def __init__(self) -> None:
        self.lines = [""]
        self._column = 0
        self._rest = ""

    def feed(self, data: bytes) -> None:
        """Shows more; an escape that is not whole yet waits for its end."""
        text = self._rest + data.decode("latin-1")
        position = 0
        while token := TOKEN.match(text, position):
            position = token.end()
            if token["text"]:
                self._write(token["text"])
            elif token["letter"]:
                self._escape(token["letter"], int(token["count"] or 1))
            else:
                self._control(token[0])
        self._rest = text[position:]

    def _write(self, text: str) -> None:
        line = self.lines[-1].ljust(self._column)
        end = self._column + len(text)
        self.lines[-1] = line[: self._column] + text + line[end:]
        self._column = end

    def _escape(self, letter: str, count: int) -> None:
        if letter == "D":
            self._column = max(self._column - count, 0)
        elif letter == "C":
            self._column += count
        elif letter == "K":
            self.lines[-1] = self.lines[-1][: self._column]

    def _control(self, character: str) -> None:
        if character == "\n":
            self.lines.append("")
        elif character == "\r":
            self._column = 0
        else:
            self._column = max(self._column - 1, 0)


class Terminal:
    """The master side of a pty, and the screen that it shows."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        self._screen = Screen()

    def files(self) -> list[tuple]:
        """The file actions that make it a process's stdin and stdout."""
        return [
            (os.POSIX_SPAWN_DUP2, self._slave, 0),
            (os.POSIX_SPAWN_DUP2, self._slave, 1),
        ]

    def local_flags(self) -> int:
        """The c_lflag of its termios."""
        return int(termios.tcgetattr(self._slave)[3])

    def type(self, line: str) -> None:
        """Types a line.  Waits for its echo, as a person would."""
        os.write(self._master, line.encode())
        self.wait_for(lambda lines: lines[-1].endswith(line), f"the echo of {line}")
        os.write(self._master, b"\r")

    @property
    def lines(self) -> list[str]:
        """What is on the screen."""
        return [line for line in self._screen.lines if not line.startswith(OWN_LINES)]

    def wait_for(self, seen: Callable[[list[str]], bool], what: str) -> None:
        """Reads until `seen` is true of the lines on the screen.  Raises Mismatch."""
        deadline = time.monotonic() + DEADLINE
        while not seen(self.lines):
            left = deadline - time.monotonic()
            if not select.select([self._master], [], [], max(left, 0))[0]:
                raise Mismatch(f"{what}: the screen ends with {self._screen.lines[-6:]}")
            self._screen.feed(os.read(self._master, READ_SIZE))

    def close(self) -> None:
        os.close(self._master)
        os.close(self._slave)
