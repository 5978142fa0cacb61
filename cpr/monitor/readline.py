"""The line editor of an HMP monitor: on any chardev, with the keys and the echo of QEMU's.

    Ctrl-A Ctrl-E Home End   to the ends      Ctrl-D Del   delete the character under the cursor
    Left Right               by one           Backspace    delete the one before it
    Up Down Ctrl-P Ctrl-N    history          Ctrl-W       delete the word before it
    Tab                      completion       Ctrl-U       delete up to the cursor
    Ctrl-L                   clear screen     Enter        the line is done

Bytes are what is edited: a character of several bytes is so many positions, as in QEMU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpr.state.connections import raw, text

HISTORY_SIZE = 64
LINE_SIZE = 4095
MAX_PARAMETER = 9999  # of an escape sequence; no key has so large a one
SCREEN_COLUMNS = 80
MIN_COLUMN, MAX_COLUMN = 10, 80

NORMAL, ESCAPE, CSI, SS3 = range(4)
STATE = ("_cursor", "_shown_cursor", "_state", "_parameter", "_history_position")


class Readline:
    """Calls `write(bytes)` for what the terminal shows, `on_line(text)` for a finished line.

    `complete(line)` gets the text before the cursor and returns (candidates, how many of the
    last characters of it they continue).
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        on_line: Callable[[str], None],
        complete: Callable[[str], tuple[list[str], int]],
        prompt: str,
    ) -> None:
        self._write = write
        self._on_line = on_line
        self._complete = complete
        self._prompt = prompt.encode()
        self.history: list[bytes] = []
        self._history_position = -1
        self.restart()

    def restart(self) -> None:
        """An empty line, and no key half read."""
        self._line = bytearray()
        self._cursor = 0
        self._shown = b""
        self._shown_cursor = 0
        self._state = NORMAL
        self._parameter = 0

    def save(self) -> dict[str, Any]:
        """The line, the cursor, half a key and the history, for `restore` in another image."""
        return {
            "line": text(self._line),
            "shown": text(self._shown),
            "history": [text(line) for line in self.history],
            **{name: getattr(self, name) for name in STATE},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The terminal shows it all already."""
        self._line = bytearray(raw(state["line"]))
        self._shown = raw(state["shown"])
        self.history = [raw(line) for line in state["history"]]
        for name in STATE:
            setattr(self, name, state[name])

    def show_prompt(self) -> None:
        """Starts a line; the terminal's cursor is at the left."""
        self._write(self._prompt)
        self._shown = b""
        self._shown_cursor = 0
        self._state = NORMAL

    def feed(self, byte: int) -> None:
        """Handles one byte from the keyboard."""
        if self._state == ESCAPE:
            self._state = {0x5B: CSI, 0x4F: SS3}.get(byte, NORMAL)
            self._parameter = 0
        elif self._state == CSI:
            self._control_sequence(byte)
        elif self._state == SS3:
            self._state = NORMAL
            self._function_key(byte)
        else:
            self._key(byte)
        self._update()

    def _key(self, byte: int) -> None:
        if byte in (0x0A, 0x0D):
            self._enter()
        elif byte >= 0x20 and byte not in (0x7F, 0x9B):
            self._insert(byte)
        elif byte == 0x1B:
            self._state = ESCAPE
        elif byte == 0x9B:
            self._state = CSI
            self._parameter = 0
        elif action := KEYS.get(byte):
            action(self)

    def _control_sequence(self, byte: int) -> None:
        if 0x30 <= byte <= 0x39:
            self._parameter = min(self._parameter * 10 + byte - 0x30, MAX_PARAMETER)
            return
        self._state = NORMAL
        keys, key = (TILDE_KEYS, self._parameter) if byte == 0x7E else (CSI_KEYS, byte)
        if action := keys.get(key):
            action(self)

    def _function_key(self, byte: int) -> None:
        if action := SS3_KEYS.get(byte):
            action(self)

    # Editing.

    def _insert(self, byte: int) -> None:
        if len(self._line) < LINE_SIZE:
            self._line.insert(self._cursor, byte)
            self._cursor += 1

    def _to_start(self) -> None:
        self._cursor = 0

    def _to_end(self) -> None:
        self._cursor = len(self._line)

    def _left(self) -> None:
        self._cursor = max(0, self._cursor - 1)

    def _right(self) -> None:
        self._cursor = min(len(self._line), self._cursor + 1)

    def _delete(self) -> None:
        del self._line[self._cursor : self._cursor + 1]

    def _backspace(self) -> None:
        if self._cursor > 0:
            self._cursor -= 1
            self._delete()

    def _delete_word(self) -> None:
        start = self._cursor - 1
        while start > 0 and self._line[start : start + 1].isspace():
            start -= 1
        while start > 0 and not self._line[start - 1 : start].isspace():
            start -= 1
        if start == 1:
            start = 0  # a single blank before the first word goes with it
        del self._line[max(0, start) : self._cursor]
        self._cursor = max(0, start)

    def _delete_to_start(self) -> None:
        del self._line[: self._cursor]
        self._cursor = 0

    def _clear_screen(self) -> None:
        self._write(b"\x1b[2J\x1b[1;1H")
        self.show_prompt()

    def _enter(self) -> None:
        line = bytes(self._line)
        self._remember(line)
        self._write(b"\r\n")
        self.restart()
        self._on_line(line.decode(errors="surrogateescape"))

    # History.

    def _remember(self, line: bytes) -> None:
        if line:
            if line in self.history:
                self.history.remove(line)
            self.history.append(line)
            del self.history[:-HISTORY_SIZE]
            self._history_position = -1

    def _up(self) -> None:
        if self._history_position == -1:
            self._history_position = len(self.history)
        if self._history_position > 0:
            self._history_position -= 1
            self._recall(self.history[self._history_position])
        elif not self.history:
            self._history_position = -1

    def _down(self) -> None:
        if self._history_position == -1:
            return
        self._history_position += 1
        if self._history_position < len(self.history):
            self._recall(self.history[self._history_position])
        else:
            self._history_position = -1
            self._recall(b"")

    def _recall(self, line: bytes) -> None:
        self._line[:] = line
        self._cursor = len(line)

    # Completion.

    def _tab(self) -> None:
        line = bytes(self._line[: self._cursor]).decode(errors="surrogateescape")
        candidates, typed = self._complete(line)
        if not candidates:
            return
        ending = " " if len(candidates) == 1 and not candidates[0].endswith("/") else ""
        common = _common_prefix(candidates)
        if len(candidates) > 1:
            self._list(candidates)
        for byte in (common[typed:] + ending).encode(errors="surrogateescape"):
            self._insert(byte)

    def _list(self, candidates: list[str]) -> None:
        width = max(len(candidate) for candidate in candidates) + 2
        width = min(max(width, MIN_COLUMN), MAX_COLUMN)
        columns = SCREEN_COLUMNS // width
        rows = [candidates[i : i + columns] for i in range(0, len(candidates), columns)]
        text = "".join("".join(name.ljust(width) for name in row) + "\r\n" for row in rows)
        self._write(b"\r\n" + text.encode(errors="surrogateescape"))
        self.show_prompt()

    # The terminal.

    def _update(self) -> None:
        """Makes the terminal show the line, in one go."""
        output = b""
        if self._line != self._shown:
            output = b"\x1b[D" * self._shown_cursor + bytes(self._line) + b"\x1b[K"
            self._shown = bytes(self._line)
            self._shown_cursor = len(self._line)
        if self._cursor > self._shown_cursor:
            output += b"\x1b[C" * (self._cursor - self._shown_cursor)
        else:
            output += b"\x1b[D" * (self._shown_cursor - self._cursor)
        self._shown_cursor = self._cursor
        if output:
            self._write(output)


def _common_prefix(words: list[str]) -> str:
    shortest, longest = min(words), max(words)
    for index, char in enumerate(shortest):
        if longest[index] != char:
            return shortest[:index]
    return shortest


KEYS: dict[int, Callable[[Readline], None]] = {
    0x01: Readline._to_start,
    0x04: Readline._delete,
    0x05: Readline._to_end,
    0x08: Readline._backspace,
    0x09: Readline._tab,
    0x0C: Readline._clear_screen,
    0x0E: Readline._down,
    0x10: Readline._up,
    0x15: Readline._delete_to_start,
    0x17: Readline._delete_word,
    0x7F: Readline._backspace,
}
CSI_KEYS: dict[int, Callable[[Readline], None]] = {
    ord("A"): Readline._up,
    ord("F"): Readline._up,
    ord("B"): Readline._down,
    ord("E"): Readline._down,
    ord("C"): Readline._right,
    ord("D"): Readline._left,
}
TILDE_KEYS: dict[int, Callable[[Readline], None]] = {
    1: Readline._to_start,
    3: Readline._delete,
    4: Readline._to_end,
}
SS3_KEYS: dict[int, Callable[[Readline], None]] = {
    ord("F"): Readline._to_end,
    ord("H"): Readline._to_start,
}
