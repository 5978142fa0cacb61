"""The JSON that QMP clients send: a stream of values in QEMU's dialect, parsed as it comes in.

The dialect: strings in double or single quotes, keywords in lower case.  Positions in errors are
line:column of the stream, from 1.  After a lexical error input is skipped up to the next
structural character or the line's end, after a syntax error to the end of the value in which it
is: a client gets one error for one mistake, and the next command is understood.
"""

from __future__ import annotations

import re
from typing import Any

from cpr.errors import CommandError

MAX_TOKEN_SIZE = 64 << 20  # bytes of one value's tokens, as in QEMU
MAX_TOKEN_COUNT = 2 << 20  # as in QEMU
MAX_NESTING = 512  # QEMU has 1024; json.dumps could not echo such an id
MAX_WORD_SIZE = 64 << 10  # bytes of a number or keyword, which is read again as it grows
MAX_DIGITS = 20  # of an integer that fits into 64 bits
I64_MIN, U64_MAX = -(1 << 63), (1 << 64) - 1

BLANKS = re.compile(rb"[ \t\r]+")
RECOVERED = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff{}\[\],:]")
WORD = re.compile(rb"[a-z]+")
# A whole number; one that goes on in a way that no number does is whole up to there.
WHOLE_NUMBER = re.compile(
    rb"-?(?:(?:0\.[0-9]+|[1-9][0-9]*(?:\.[0-9]+)?)(?:[eE][-+]?[0-9]+)?|0(?![0-9]))"
)
# The longest start of a number, whole or not.
BEGUN_NUMBER = re.compile(
    rb"-?(?:(?:0\.[0-9]+|[1-9][0-9]*(?:\.[0-9]+)?)[eE][-+]?[0-9]*|[1-9][0-9]*(?:\.[0-9]*)?|0(?:\.[0-9]*)?)?"
)
STRING_BODY = {
    ord(quote): re.compile(rb"(?:[^\x00-\x1f\\\xfe\xff" + quote + rb"]++|\\[^\x00-\x1f\xfe\xff])*+")
    for quote in (b'"', b"'")
}
ESCAPE = re.compile(r"\\(u[^\\]{0,4}|.)", re.DOTALL)
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"} | {c: c for c in "/\\\"'"}
KEYWORDS = {b"true": True, b"false": False, b"null": None}
MARKS = frozenset(b"{}[],:")

START, KEY, COLON, VALUE, COMMA = range(5)  # what a container expects next


class _Container:
    __slots__ = ("expects", "key", "value")

    def __init__(self, value: dict | list) -> None:
        self.value = value
        self.key = ""
        self.expects = START


class JsonStream:
    """Feed it bytes; it gives values, and a CommandError in the place of each that is broken."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0  # how far into the buffer an unfinished string has been looked at
        self._line = 1
        self._column = 1
        self._reread = False  # the next character also ended the token or skipping before it
        self._skipping = False
        self._results: list[Any] = []
        self._reset()

    def feed(self, data: bytes) -> list[Any]:
        """The values and errors that `data` completes, in order."""
        self._buffer += data
        while self._buffer and self._step():
            pass
        results, self._results = self._results, []
        return results

    # Lexical.

    def _step(self) -> bool:
        """Takes one token, blank or piece of rubbish off the buffer.  False: more is needed."""
        buffer = self._buffer
        char = buffer[0]
        if self._skipping:
            found = RECOVERED.search(buffer)
            self._skipping = found is None
            self._take(found.start() if found else len(buffer))
            self._reread = found is not None
            return not self._skipping
        if char == 0x0A:
            self._take(1)
            self._line, self._column = self._line + 1, 1
            return True
        if blanks := BLANKS.match(buffer):
            self._take(blanks.end())
            return True
        if char in MARKS:
            self._token(1)
            return True
        if char in STRING_BODY:
            return self._string(char)
        if word := WORD.match(buffer):
            return self._open_ended(word.end())
        return self._number()

    def _take(self, size: int) -> None:
        del self._buffer[:size]
        self._column += size
        self._scanned = 0
        self._reread = False

    def _string(self, quote: int) -> bool:
        body = STRING_BODY[quote].match(self._buffer, max(1, self._scanned))
        assert body is not None
        end = body.end()
        rest = self._buffer[end : end + 2]
        if not rest or rest == b"\\":
            self._scanned = end
            return self._unfinished(end, MAX_TOKEN_SIZE)
        if rest[0] == quote:
            self._token(end + 1)
        else:
            self._stray(end + (2 if rest[0] == 0x5C else 1))
        return True

    def _number(self) -> bool:
        started = BEGUN_NUMBER.match(self._buffer)
        assert started is not None
        end = started.end()
        if end == len(self._buffer):
            return self._unfinished(end, MAX_WORD_SIZE)
        complete = WHOLE_NUMBER.match(self._buffer)
        if complete is None or complete.end() != end:
            self._stray(end + 1)
            return True
        return self._open_ended(end)

    def _open_ended(self, end: int) -> bool:
        """A word or number, which only the character behind it ends."""
        if end == len(self._buffer):
            return self._unfinished(end, MAX_WORD_SIZE)
        self._token(end)
        self._reread = True
        return True

    def _unfinished(self, size: int, limit: int) -> bool:
        """A token that goes on behind the buffer's end; not for ever."""
        if size > limit:
            self._lexical_error(size, "JSON token size limit exceeded")
            return True
        return False

    def _peek(self, size: int) -> bytes:
        return bytes(self._buffer[:size])

    def _stray(self, size: int) -> None:
        text = self._peek(size).partition(b"\0")[0].decode(errors="replace")
        self._lexical_error(size, self._at(f"stray '{text}'"))

    def _lexical_error(self, size: int, text: str) -> None:
        if not self._discarding:
            self._results.append(CommandError(text))
        ends_line = self._peek(size).endswith(b"\n")
        self._take(size)
        if ends_line:
            self._line, self._column = self._line + 1, 1
        self._reset()
        self._skipping = True

    def _at(self, text: str) -> str:
        return f"{self._line}:{self._column + self._reread}: JSON parse error, {text}"

    # Syntax.

    def _reset(self) -> None:
        """Between two values of the stream."""
        self._stack: list[_Container] = []
        self._discarding = False
        self._braces = self._brackets = 0
        self._tokens = self._size = 0

    def _token(self, size: int) -> None:
        """Handles the token of `size` bytes and takes it off the buffer."""
        text = self._peek(size)
        self._braces += (text == b"{") - (text == b"}")
        self._brackets += (text == b"[") - (text == b"]")
        self._tokens += 1
        self._size += len(text)
        if not self._discarding:
            try:
                self._check_limits()
                self._syntax(text)
            except CommandError as error:
                self._results.append(error)
                self._stack = []
                self._discarding = True
        self._take(size)
        if min(self._braces, self._brackets) < 0 or self._braces == self._brackets == 0:
            self._reset()

    def _check_limits(self) -> None:
        if self._size > MAX_TOKEN_SIZE:
            raise CommandError("JSON token size limit exceeded")
        if self._tokens > MAX_TOKEN_COUNT:
            raise CommandError("JSON token count limit exceeded")
        if self._braces + self._brackets > MAX_NESTING:
            raise CommandError("JSON nesting depth limit exceeded")

    def _syntax(self, text: bytes) -> None:
        top = self._stack[-1] if self._stack else None
        if top is not None and top.expects != VALUE:
            if isinstance(top.value, dict):
                self._in_object(top, text)
                return
            if self._in_array(top, text):
                return
        if text in (b"{", b"["):
            self._stack.append(_Container({} if text == b"{" else []))
        elif text[0] in MARKS:
            raise CommandError(self._at("expecting value"))
        else:
            self._complete(self._scalar(text))

    def _in_object(self, top: _Container, text: bytes) -> None:
        """What may stand in an object where no value is due."""
        if top.expects == COMMA:
            self._comma_or_end(top, text, b"}")
        elif top.expects == COLON:
            if text != b":":
                raise CommandError(self._at("expecting ':'"))
            top.expects = VALUE
        elif top.expects == START and text == b"}":
            self._close()
        elif text[0] in STRING_BODY:
            top.key = self._unescape(text)
            top.expects = COLON
        else:
            raise CommandError(self._at("expecting key"))

    def _in_array(self, top: _Container, text: bytes) -> bool:
        """The same for an array; False where the token has to be a value."""
        if top.expects == COMMA:
            self._comma_or_end(top, text, b"]")
            return True
        if text == b"]":
            self._close()
            return True
        return False

    def _comma_or_end(self, top: _Container, text: bytes, end: bytes) -> None:
        if text == b",":
            top.expects = KEY if end == b"}" else VALUE
        elif text == end:
            self._close()
        else:
            raise CommandError(self._at(f"expected ',' or '{end.decode()}'"))

    def _close(self) -> None:
        self._complete(self._stack.pop().value)

    def _complete(self, value: Any) -> None:
        if not self._stack:
            self._results.append(value)
            return
        top = self._stack[-1]
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.key in top.value:
            raise CommandError(self._at("duplicate key"))
        else:
            top.value[top.key] = value
        top.expects = COMMA

    def _scalar(self, text: bytes) -> Any:
        if text[0] in STRING_BODY:
            return self._unescape(text)
        if text[:1].islower():
            if text not in KEYWORDS:
                raise CommandError(self._at(f"invalid keyword '{text.decode()}'"))
            return KEYWORDS[text]
        digits = text.removeprefix(b"-")
        if len(digits) <= MAX_DIGITS and digits.isdigit():
            number = int(text)
            if I64_MIN <= number <= U64_MAX:
                return number
        return float(text)

    def _unescape(self, token: bytes) -> str:
        body = token[1:-1].replace(b"\xc0\x80", b"\0")  # modified UTF-8's NUL
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise CommandError(self._at("invalid UTF-8 sequence in string")) from None
        if "\\" not in text:
            return text
        pieces: list[str] = []
        position = 0
        while (found := ESCAPE.search(text, position)) is not None:
            pieces.append(text[position : found.start()])
            position = found.end()
            if found[1][0] != "u":
                if found[1] not in ESCAPES:
                    raise CommandError(self._at("invalid escape sequence in string"))
                pieces.append(ESCAPES[found[1]])
                continue
            code = _hexadecimal(found[1])
            following = ESCAPE.match(text, position)
            if 0xD800 <= code < 0xDC00 and following is not None:
                low = _hexadecimal(following[1])
                if 0xDC00 <= low < 0xE000:
                    code = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF)
                    position = following.end()
            if not _is_character(code):
                shown = (text + chr(token[0]))[found.start() : found.start() + 6]
                raise CommandError(self._at(f"{shown} is not a valid Unicode character"))
            pieces.append(chr(code))
        return "".join([*pieces, text[position:]])


def _hexadecimal(escape: str) -> int:
    """The code of an escape uXXXX; -1 for anything else."""
    digits = escape[1:]
    if len(digits) != 4 or escape[0] != "u" or not digits.isalnum() or not digits.isascii():
        return -1
    try:
        return int(digits, 16)
    except ValueError:
        return -1


def _is_character(code: int) -> bool:
    """Unicode's characters without surrogates and noncharacters."""
    if code < 0 or 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0:
        return False
    return code & 0xFFFE != 0xFFFE
