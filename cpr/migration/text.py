"""What is typed at the HMP for a migration parameter, turned into its value.

The rules are those of QEMU's string visitors, and the shell-like splitting into words that of
GLib's g_shell_parse_argv; so are the error texts.
"""

from __future__ import annotations

from cpr.config.option_values import parse_bool, parse_int, parse_size
from cpr.config.options import SIZE_HINT
from cpr.constants import U64_LIMIT
from cpr.errors import CommandError

I64_MAX = (1 << 63) - 1


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
        if text[:2].lower() == "0x":
            value = parse_size(text) << 20
        else:
            value = parse_size(text if text[-1:].isalpha() else f"{text}M")
    except (OverflowError, ValueError):
        value = U64_LIMIT
    if value > I64_MAX:
        raise CommandError(f"Invalid size {text}")
    return value


def integer_parameter(name: str, text: str) -> int:
    """An integer as C writes them; a negative one wraps."""
    try:
        return parse_int(text) % U64_LIMIT
    except (OverflowError, ValueError):
        raise CommandError(f"Parameter '{name}' expects uint64") from None


def bool_parameter(name: str, text: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError:
        raise CommandError(f"Parameter '{name}' expects 'on' or 'off'") from None


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
