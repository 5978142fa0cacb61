"""The values of QEMU's options.

    boolean     on, yes, true, y; off, no, false, n
    integer     as in C: 10, 0x10, 0b10, 010
    size        bytes: 0x1000000, or decimal with a suffix b, k, M, G, T, P or E: 16M, 1.5G
    identifier  letters, digits, '-', '.', '_', starting with a letter

Errors are ConfigErrors that begin with the place, as "-m foo: …" or "guest.cfg:12: …".
"""

from __future__ import annotations

from cpr.constants import SIZE_SUFFIXES, U64_LIMIT
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Kind = str | tuple[str, ...]

OPTS = "opts"
KEYVAL = "keyval"
JSON = "json"

# The kinds of values; a tuple of strings is an enumeration of what is accepted.
STRING = "string"
BOOL = "bool"
INT = "int"
SIZE = "size"

TRUE_WORDS = ("on", "yes", "true", "y")
FALSE_WORDS = ("off", "no", "false", "n")
MAX_DIGITS = 80  # a longer number is out of any range; Python refuses to convert thousands
BLANKS = " \t\n\v\f\r"
BASES = {"0x": 16, "0X": 16, "0b": 2, "0B": 2}

# What a property of an object is said to expect, which depends on how it was given.
EXPECTED = {
    OPTS: {SIZE: "a size value", INT: "a uint64 value"},
    KEYVAL: {SIZE: "size", INT: "integer"},
}


def error(location: str, text: str) -> ConfigError:
    """The ConfigError for `text` at `location`, which may be empty."""
    return ConfigError(f"{location}: {text}" if location else text)


def is_identifier(text: str) -> bool:
    if not (text[:1].isalpha() and text.isascii()):
        return False
    return all(character.isalnum() or character in "-._" for character in text)


def parse_bool(text: str) -> bool:
    """on, yes, true or y; off, no, false or n.  Raises ValueError."""
    if text in TRUE_WORDS:
        return True
    if text in FALSE_WORDS:
        return False
    raise ValueError(text)


def parse_int(text: str) -> int:
    """A C integer: sign, 0x, 0b or a leading 0 for octal.

    Raises ValueError, or OverflowError beyond 64 bits.
    """
    digits = text.lstrip(BLANKS)
    negative = digits[:1] == "-"
    if digits[:1] in ("-", "+"):
        digits = digits[1:]
    base = BASES.get(digits[:2], 8 if digits[:1] == "0" and len(digits) > 1 else 10)
    if base in (16, 2):
        digits = digits[2:]
    if not (digits.isascii() and digits.isalnum()):
        raise ValueError(text)
    if len(digits) > MAX_DIGITS:
        raise OverflowError(text)
    value = int(digits, base)
    if value >= U64_LIMIT:
        raise OverflowError(text)
    return -value if negative else value


def parse_size(text: str) -> int:
    """Bytes: 0x1000000, or decimal with an optional suffix b, k, M, G, T, P or E, as in 1.5G.

    A fraction needs a suffix and is rounded to whole bytes.  Raises ValueError, or OverflowError
    for a negative number and beyond 64 bits.
    """
    number = text.lstrip(BLANKS)
    negative = number[:1] == "-"
    if number[:1] in ("-", "+"):
        number = number[1:]
    value = _unsigned_size(number)
    if negative or value >= U64_LIMIT:
        raise OverflowError(text)
    return value


def _unsigned_size(number: str) -> int:
    if number[:2] in ("0x", "0X"):
        if not number[2:].isalnum():
            raise ValueError(number)
        return parse_int(number)
    shift = SIZE_SUFFIXES.get(number[-1:].lower())
    whole, _, fraction = (number if shift is None else number[:-1]).partition(".")
    digits = whole + fraction
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(number)
    if len(digits) > MAX_DIGITS:
        raise OverflowError(number)
    unit = 1 << (shift or 0)
    if unit == 1 and fraction.strip("0"):
        raise ValueError(number)
    scale = 10 ** len(fraction)
    return int(whole or 0) * unit + (int(fraction or 0) * unit * 2 + scale) // (2 * scale)


def parse_property(kind: Kind, name: str, value: Any, dialect: str, location: str) -> Any:
    """The value of an object's or a machine's property, as QEMU's visitors read it."""
    if dialect == JSON and kind in (BOOL, INT, SIZE):
        return _check_json(kind, name, value, location)
    if not isinstance(value, str):
        raise error(location, f"Invalid parameter type for '{name}', expected: string")
    try:
        if kind == BOOL:
            return parse_bool(value)
        if kind == SIZE:
            return parse_size(value)
        if kind == INT:
            number = parse_int(value)
            if number >= 0 or dialect != OPTS:
                return number
            raise ValueError(value)
    except (ValueError, OverflowError):
        expected = "'on' or 'off'" if kind == BOOL else EXPECTED[dialect][str(kind)]
        raise error(location, f"Parameter '{name}' expects {expected}") from None
    if kind != STRING and value not in kind:
        raise error(location, f"Parameter '{name}' does not accept value '{value}'")
    return value


def _check_json(kind: Kind, name: str, value: Any, location: str) -> bool | int:
    if kind == BOOL:
        if isinstance(value, bool):
            return value
        raise error(location, f"Invalid parameter type for '{name}', expected: boolean")
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise error(location, f"Parameter '{name}' expects uint64")
