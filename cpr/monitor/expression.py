"""The HMP's arithmetic: C's operators on 64-bit integers, $register and 'c'.

sum     = logic { (+ | -) logic }
logic   = product { (& | "|" | ^) product }
product = unary { (* | / | %) unary }
unary   = (+ | - | ~) unary | ( sum ) | 'c' | $register | number
"""

from __future__ import annotations

from collections.abc import Callable

from cpr.errors import CommandError

MAX_DIGITS = 22  # of a 64-bit number, in octal
REGISTER_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:"


class ExpressionError(CommandError):
    """Text that is no expression."""


class Scanner:
    """Reads one expression from `text` at `position`, which then stands after it."""

    def __init__(self, text: str, position: int, register: Callable[[str], int | None]) -> None:
        self.text = text
        self.position = position
        self._register = register

    def expression(self) -> int:
        """The value, as a signed 64-bit integer.  Raises ExpressionError."""
        self._skip_blanks()
        value = self._logic()
        while (operator := self._peek()) in ("+", "-"):
            self._next()
            other = self._logic()
            value = _wrap(value + other if operator == "+" else value - other)
        return value

    def _logic(self) -> int:
        value = self._product()
        while (operator := self._peek()) in ("&", "|", "^"):
            self._next()
            other = self._product()
            if operator == "&":
                value &= other
            elif operator == "|":
                value |= other
            else:
                value ^= other
        return value

    def _product(self) -> int:
        value = self._unary()
        while (operator := self._peek()) in ("*", "/", "%"):
            self._next()
            other = self._unary()
            if operator == "*":
                value = _wrap(value * other)
                continue
            if other == 0:
                raise ExpressionError("division by zero")
            quotient = abs(value) // abs(other)
            if (value < 0) != (other < 0):
                quotient = -quotient
            value = _wrap(quotient if operator == "/" else value - quotient * other)
        return value

    def _unary(self) -> int:
        char = self._peek()
        if char in ("+", "-", "~"):
            self._next()
            value = self._unary()
            return value if char == "+" else _wrap(-value if char == "-" else ~value)
        if char == "(":
            self._next()
            value = self.expression()
            if self._peek() != ")":
                raise ExpressionError("')' expected")
            self._next()
            return value
        if char == "'":
            return self._character()
        if char == "$":
            return self._register_value()
        if char == "":
            raise ExpressionError("unexpected end of expression")
        return self._number()

    def _character(self) -> int:
        literal = self.text[self.position + 1 : self.position + 3]
        if not literal:
            raise ExpressionError("character constant expected")
        if literal[1:] != "'":
            raise ExpressionError("missing terminating ' character")
        self.position += 2
        self._next()
        return ord(literal[0])

    def _register_value(self) -> int:
        start = self.position + 1
        end = start
        while end < len(self.text) and self.text[end] in REGISTER_CHARACTERS:
            end += 1
        self.position = end
        self._skip_blanks()
        value = self._register(self.text[start:end])
        if value is None:
            raise ExpressionError("unknown register")
        return _wrap(value)

    def _number(self) -> int:
        """As strtoull with base 0: decimal, 0x… or 0…."""
        text, start = self.text, self.position
        digits, base = "0123456789", 10
        if text[start : start + 2].lower() == "0x" and text[start + 2 : start + 3].lower() in set(
            "0123456789abcdef"
        ):
            digits, base, start = "0123456789abcdef", 16, start + 2
        elif text[start] == "0":
            digits, base = "01234567", 8
        end = start
        while end < len(text) and text[end].lower() in digits:
            end += 1
        if end == start:
            raise ExpressionError(f"invalid char '{text[start]}' in expression")
        significant = text[start:end].lstrip("0")
        value = int(significant or "0", base) if len(significant) <= MAX_DIGITS else 1 << 64
        if value >> 64:
            raise ExpressionError("number too large")
        self.position = end
        self._skip_blanks()
        return _wrap(value)

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _next(self) -> None:
        self.position += 1
        self._skip_blanks()

    def _skip_blanks(self) -> None:
        while self._peek().isspace():
            self.position += 1


def _wrap(value: int) -> int:
    """As a signed 64-bit integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
