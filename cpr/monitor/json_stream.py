"""The JSON that QMP clients send: a stream of values in QEMU's dialect, taken apart as it comes in.

The dialect: strings in double or single quotes, keywords in lower case.  Each value is decoded by
the standard library once its last bracket is there.  Positions in errors are line:column of the
stream, from 1.  After a character that no token can have, input is skipped up to the next
structural character or the line's end: a client gets one error for one mistake, and the next
command is understood.
"""

from __future__ import annotations

import re
from typing import Any

from cpr.errors import CommandError
from cpr.monitor.json_value import Broken, decode
from cpr.state.connections import raw, text

MAX_SIZE = 8 << 20  # bytes of one value; QEMU takes 64 MiB, which keeps others waiting for seconds
MAX_TOKENS = 256 << 10  # QEMU: 2 Mi
MAX_NESTING = 512  # QEMU has 1024; json.dumps could not echo such an id
MAX_WORD = 64 << 10  # bytes of a number or keyword

BLANKS = re.compile(rb"[ \t\r\n]+")
RECOVERED = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff{}\[\],:]")
MARKS = frozenset(b"{}[],:")
STRING_BODY = {
    ord(quote): re.compile(rb"(?:[^\x00-\x1f\\\xfe\xff" + quote + rb"]++|\\[^\x00-\x1f\xfe\xff])*+")
    for quote in (b'"', b"'")
}
WORD = re.compile(rb"[-+.0-9A-Za-z]*")
STATE = (
    *("_line", "_column", "_end", "_reached", "_skipping", "_lookahead"),
    *("_braces", "_brackets", "_tokens", "_discarding"),
)
SCALAR = re.compile(rb"[a-z]+|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?")


class JsonStream:
    """Feed it bytes; it gives values, and a CommandError in the place of each that is broken."""

    def __init__(self) -> None:
        self._buffer = bytearray()  # from the start of a value on
        self._line = self._column = 1  # of the buffer's start
        self._end = 0  # of the tokens that the buffer has
        self._reached = 0  # what has been looked at of an unfinished one
        self._skipping = False
        self._lookahead = False  # the buffer's first character has also ended what was before
        self._results: list[Any] = []
        self._begin()

    def save(self) -> dict[str, Any]:
        """Where it is in a value, for `restore` in another image; the buffer is text of bytes."""
        return {name: getattr(self, name) for name in STATE} | {"buffer": text(self._buffer)}

    def restore(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self._buffer = bytearray(raw(state["buffer"]))

    def feed(self, data: bytes) -> list[Any]:
        """The values and errors that `data` completes, in order."""
        self._buffer += data
        while self._step():
            pass
        results, self._results = self._results, []
        return results

    def _begin(self) -> None:
        """Between two values of the stream."""
        self._braces = self._brackets = self._tokens = 0
        self._discarding = False

    def _step(self) -> bool:
        """Goes over one token, blank or piece of rubbish.  False: more is needed."""
        buffer = self._buffer
        if self._skipping:
            found = RECOVERED.search(buffer)
            self._take(found.start() if found else len(buffer))
            self._skipping = found is None
            self._lookahead = True
            return not self._skipping
        start = self._end
        if start == len(buffer):
            return False
        char = buffer[start]
        if blanks := BLANKS.match(buffer, start):
            self._end = self._reached = blanks.end()
            if not self._tokens or self._discarding:
                self._take(self._end)
            else:
                self._unfinished(self._end, MAX_SIZE)
            return True
        if char in MARKS:
            return self._token(start + 1)
        if char not in STRING_BODY:
            return self._word(start)
        body = STRING_BODY[char].match(buffer, max(start + 1, self._reached))
        assert body is not None
        end = body.end()
        following = buffer[end : end + 2]
        if following in (b"", b"\\"):
            return self._unfinished(end, MAX_SIZE)
        if following[0] != char:
            return self._stray(end + (2 if following[0] == 0x5C else 1))
        return self._token(end + 1)

    def _word(self, start: int) -> bool:
        """A number or keyword, which only the character after it ends."""
        word = WORD.match(self._buffer, max(start, self._reached))
        assert word is not None
        end = word.end()
        if end == len(self._buffer) or end - start > MAX_WORD:
            return self._unfinished(end, start + MAX_WORD)
        if not SCALAR.fullmatch(self._buffer, start, end):
            return self._stray(max(end, start + 1))
        return self._token(end)

    def _unfinished(self, end: int, limit: int) -> bool:
        """A token that goes on where the buffer ends; not for ever."""
        self._reached = end
        return end > limit and self._rubbish(end, "JSON token size limit exceeded")

    def _stray(self, end: int) -> bool:
        text = self._buffer[self._end : end].partition(b"\0")[0].decode(errors="replace")
        return self._rubbish(end, self._at(self._end, f"stray '{text}'"))

    def _rubbish(self, end: int, text: str) -> bool:
        if not self._discarding:
            self._results.append(CommandError(text))
        self._take(end)
        self._begin()
        self._skipping = True
        return True

    def _token(self, end: int) -> bool:
        mark = self._buffer[self._end]
        self._braces += (mark == 0x7B) - (mark == 0x7D)
        self._brackets += (mark == 0x5B) - (mark == 0x5D)
        self._tokens += 1
        self._end = self._reached = end
        if not self._discarding and (limit := self._exceeded()):
            self._results.append(CommandError(f"JSON {limit} limit exceeded"))
            self._discarding = True
        if min(self._braces, self._brackets) < 0 or self._braces == self._brackets == 0:
            if not self._discarding:
                self._results.append(self._decode(bytes(self._buffer[:end])))
            self._take(end)
            self._begin()
        elif self._discarding:
            self._take(end)
        return True

    def _exceeded(self) -> str:
        if self._end > MAX_SIZE:
            return "token size"
        if self._tokens > MAX_TOKENS:
            return "token count"
        return "nesting depth" if self._braces + self._brackets > MAX_NESTING else ""

    def _take(self, size: int) -> None:
        """Removes the buffer's first bytes."""
        if size:
            self._line, self._column = self._position(size)
            self._lookahead = self._buffer[size - 1 : size].isalnum()
        del self._buffer[:size]
        self._end = self._reached = 0

    def _position(self, offset: int) -> tuple[int, int]:
        newline = self._buffer.rfind(b"\n", 0, offset)
        if newline < 0:
            return self._line, self._column + offset
        return self._line + self._buffer.count(b"\n", 0, offset), offset - newline

    def _at(self, offset: int, text: str) -> str:
        """QEMU counts the character that ends a word or skipping twice."""
        line, column = self._position(offset)
        column += self._buffer[offset - 1 : offset].isalnum() if offset else self._lookahead
        return f"{line}:{column}: JSON parse error, {text}"

    def _decode(self, raw: bytes) -> Any:
        """The value of `raw`, or the error in it."""
        try:
            return decode(raw)
        except RecursionError:
            return CommandError("JSON nesting depth limit exceeded")
        except Broken as error:
            return CommandError(self._at(error.offset(raw), error.text))
