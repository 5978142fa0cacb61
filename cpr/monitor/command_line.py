"""Reads the arguments of an HMP command line, each by its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpr.errors import CommandError
from cpr.migration import text as parameter_text
from cpr.monitor.expression import ExpressionError, Scanner
from cpr.monitor.schema import Argument, Command, Flag

ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
DIGITS = tuple("0123456789")
FORMATS = "oduxic"
MAX_COUNT_DIGITS = 9
MAX_LINE_SIZE = 64 << 10
"""Characters of a command line; the line editor takes fewer, human-monitor-command no more."""

SIZES = {"b": 1, "h": 2, "w": 4, "g": 8, "L": 8}

Register = Callable[[str], "int | None"]


class UsageError(Exception):
    """What the user is told, as it stands, about a line that cannot be understood."""


class Line:
    """A command line and how far it has been read."""

    def __init__(self, text: str) -> None:
        """Raises UsageError for one that is too long."""
        if len(text) > MAX_LINE_SIZE:
            raise UsageError(f"command line of more than {MAX_LINE_SIZE} characters")
        self._text = text
        self._position = 0

    def at_end(self) -> bool:
        self._skip_blanks()
        return self._position == len(self._text)

    def taken(self) -> str:
        """What has been read."""
        return self._text[: self._position]

    def command_name(self) -> str:
        """A name ends at a blank or at the / of a format."""
        self._skip_blanks()
        start = self._position
        while self._peek() not in ("", "/") and not self._peek().isspace():
            self._position += 1
        return self._text[start : self._position]

    def words(self) -> list[str]:
        """All of the line in words.  Raises UsageError for an open quote."""
        words = []
        while not self.at_end():
            words.append(self._string())
        return words

    def _string(self) -> str:
        """A word, or what is in double quotes.  Raises UsageError."""
        self._skip_blanks()
        start = self._position
        if self._peek() != '"':
            while self._peek() and not self._peek().isspace():
                self._position += 1
            return self._text[start : self._position]
        self._position += 1
        result: list[str] = []
        while (char := self._peek()) != '"':
            if char == "":
                raise UsageError("unterminated string")
            self._position += 1
            if char == "\\":
                char = self._peek()
                if char not in ESCAPES:
                    raise UsageError(f"unsupported escape code: '\\{char}'")
                char = ESCAPES[char]
                self._position += 1
            result.append(char)
        self._position += 1
        return "".join(result)

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _skip_blanks(self) -> None:
        while self._peek().isspace():
            self._position += 1


class ArgumentReader(Line):
    """Reads the arguments of `command` from where `line` stands; `register` gives $name."""

    def __init__(self, line: Line, command: Command, register: Register) -> None:
        super().__init__(line._text)
        self._position = line._position
        self._command = command
        self._register = register

    def read(self) -> dict[str, Any]:
        """The arguments by keyword; those that were left out are missing.

        Raises UsageError, with a hint at the help for what was typed as the command.
        """
        typed = self.taken().strip()
        result: dict[str, Any] = {}
        try:
            arguments = self._command.hmp_arguments()
            for index, argument in enumerate(arguments):
                self._read_one(argument, arguments[index:], result)
            if not self.at_end():
                raise self._complaint("extraneous characters at the end of line")
        except (UsageError, ExpressionError) as error:
            hint = f'Try "help {typed}" for more information'
            raise UsageError(f"{error}\n{hint}") from None
        return result

    def _read_one(self, argument: Argument, ahead: list[Argument], result: dict[str, Any]) -> None:
        kind = argument.kind
        if isinstance(kind, Flag):
            result[argument.keyword] = self._flag(kind.letter, ahead)
        elif kind.hmp == "format":
            result[argument.keyword] = self._format()
        elif argument.optional and self.at_end():
            return
        elif kind.hmp == "string":
            result[argument.keyword] = self._required_string()
        elif kind.hmp == "line":
            result[argument.keyword] = self._rest()
        elif kind.hmp == "words":
            try:
                result[argument.keyword] = parameter_text.words(self._rest())
            except CommandError as error:
                raise UsageError(str(error)) from None
        elif kind.hmp == "on|off":
            result[argument.keyword] = self._on_or_off()
        else:
            result[argument.keyword] = self._number(kind.hmp == "int")

    def _flag(self, letter: str, ahead: list[Argument]) -> bool:
        """One option: it is this one, another that is still to be read, or an unknown one."""
        self._skip_blanks()
        if self._peek() != "-":
            return False
        found = self._text[self._position + 1 : self._position + 2]
        if found == letter:
            self._position += 2
            return True
        letters = {flag.kind.letter for flag in ahead if isinstance(flag.kind, Flag)}
        if found in letters:
            return False
        raise self._complaint(f"unsupported option -{found}")

    def _format(self) -> dict[str, Any]:
        """/COUNT FORMAT SIZE; `format` is "" and `size` 0 where they are not given."""
        self._skip_blanks()
        if self._peek() != "/":
            return {"count": 1, "format": "", "size": 0}
        self._position += 1
        start = self._position
        while self._peek() in DIGITS:
            self._position += 1
        digits = self._text[start : self._position]
        if len(digits) > MAX_COUNT_DIGITS:
            raise UsageError(f"count too large: {digits}")
        count = int(digits or "1")
        letter, size = "", 0
        while (char := self._peek()) and (char in FORMATS or char in SIZES):
            self._position += 1
            if char in FORMATS:
                letter = char
            else:
                size = SIZES[char]
        if self._peek() and not self._peek().isspace():
            raise UsageError(f"invalid char in format: '{self._peek()}'")
        return {"count": count, "format": letter, "size": size}

    def _number(self, narrow: bool) -> int:
        """An expression; unsigned unless `narrow`, which means 32 bits."""
        scanner = Scanner(self._text, self._position, self._register)
        try:
            value = scanner.expression()
        except RecursionError:
            raise UsageError("expression is nested too deeply") from None
        self._position = scanner.position
        if not narrow:
            return value % (1 << 64)
        if value >> 32:
            name = self._command.hmp.removeprefix("info ")
            raise UsageError(f"'{name}' has failed: integer is for 32-bit values")
        return value

    def _required_string(self) -> str:
        if self.at_end():
            raise self._complaint("string expected")
        return self._string()

    def _rest(self) -> str:
        if self.at_end():
            raise self._complaint("string expected")
        start, self._position = self._position, len(self._text)
        return self._text[start:]

    def _on_or_off(self) -> bool:
        self._skip_blanks()
        start = self._position
        while self._peek() and not self._peek().isspace():
            self._position += 1
        word = self._text[start : self._position]
        if word not in ("on", "off"):
            raise UsageError("Expected 'on' or 'off'")
        return word == "on"

    def _complaint(self, text: str) -> UsageError:
        return UsageError(f"{self._command.hmp.removeprefix('info ')}: {text}")
