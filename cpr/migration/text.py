"""What is typed at the HMP for a migration parameter, turned into its value.

The rules are those of QEMU's string visitors, and the shell-like splitting into words that of
GLib's g_shell_parse_argv; so are the error texts.
"""

from __future__ import annotations

from cpr.errors import CommandError

SUFFIXES = "bkmgtpe"
U64 = 1 << 64
I64_MAX = (1 << 63) - 1

SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


def parse_size(text: str, unit: int = 1) -> int:
    """Bytes, from a decimal number (with a fraction, if the suffix allows) and one suffix of
    bkmgtpe, or from 0x… without either; `unit` is that of a number without suffix.

    Raises ValueError for what is no size and OverflowError for one outside 0…2**64-1.
    """
    if text[:2].lower() == "0x":
        value = _hexadecimal(text[2:]) * unit
    elif text[:1] == "-" and text[1:].isdecimal():
        raise OverflowError(text)
    else:
        number = text.removeprefix("+")
        if number and number[-1].lower() in SUFFIXES:
            unit = 1024 ** SUFFIXES.index(number[-1].lower())
            number = number[:-1]
        value = _decimal(number, unit)
    if value >= U64:
        raise OverflowError(text)
    return value


def _hexadecimal(digits: str) -> int:
    if not digits.isalnum() or not digits.isascii():
        raise ValueError(digits)
    return int(digits, 16)


def _decimal(number: str, unit: int) -> int:
    whole, _, fraction = number.partition(".")
    if not (whole + fraction).isdecimal() or not number.isascii():
        raise ValueError(number)
    value = int(whole or "0") * unit
    if fraction.strip("0"):
        if unit == 1:
            raise ValueError(number)
        scale = 10 ** len(fraction)
        value += (2 * int(fraction) * unit + scale) // (2 * scale)
    return value


def size_parameter(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except OverflowError:
        raise CommandError(f"Value '{text}' is out of range for parameter '{name}'") from None
    except ValueError:
        raise CommandError(
            f"Parameter '{name}' expects a non-negative number below 2^64\n{SIZE_HINT}"
        ) from None


def mib_parameter(text: str) -> int:
    """A size whose number without a suffix is in MiB."""
    try:
        value = parse_size(text, 1 << 20)
    except (OverflowError, ValueError):
        value = U64
    if value > I64_MAX:
        raise CommandError(f"Invalid size {text}")
    return value


def integer_parameter(name: str, text: str) -> int:
    """An integer as C writes them: decimal, 0x… or 0… (octal), with a sign."""
    digits = text.lstrip("+-") if len(text) - len(text.lstrip("+-")) < 2 else ""
    base = 16 if digits[:2].lower() == "0x" else 8 if digits[:1] == "0" else 10
    try:
        value = int(digits[2:] if base == 16 else digits, base)
    except ValueError:
        value = U64
    if value >= U64 or "_" in text or " " in text:
        raise CommandError(f"Parameter '{name}' expects uint64")
    return -value % U64 if text[:1] == "-" else value


def bool_parameter(name: str, text: str) -> bool:
    if text in ("on", "yes", "true", "y"):
        return True
    if text in ("off", "no", "false", "n"):
        return False
    raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")


def words(text: str) -> list[str]:
    """Splits like a shell: blanks, 'single' and "double" quotes, backslashes, # comments.

    Raises CommandError for an open quote, a backslash at the end, and where there is no word.
    """
    result: list[str] = []
    word: str | None = None
    quote = ""
    position = 0
    while position < len(text):
        char = text[position]
        position += 1
        if quote and char == quote:
            quote = ""
        elif quote == "'" or (quote and char != "\\"):
            word = (word or "") + char
        elif char == "\\":
            if position == len(text):
                raise CommandError(
                    f"Text ended just after a “\\” character. (The text was “{text}”)"
                )
            escaped = text[position]
            position += 1
            if quote and escaped not in '"\\$`\n':
                escaped = "\\" + escaped
            if quote or escaped != "\n":
                word = (word or "") + escaped
        elif char in "\"'":
            quote = char
            word = word or ""
        elif char in " \t\n":
            if word is not None:
                result.append(word)
            word = None
        elif char == "#" and word is None:
            end = text.find("\n", position)
            position = len(text) if end < 0 else end
        else:
            word = (word or "") + char
    if quote:
        raise CommandError(
            f"Text ended before matching quote was found for {quote}. (The text was “{text}”)"
        )
    if word is not None:
        result.append(word)
    if not result:
        raise CommandError("Text was empty (or contained only whitespace)")
    return result
