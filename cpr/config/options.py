"""QEMU's option grammar: how `key=value,…` is split, and what its values mean.

    opts      -chardev, -drive, -object …   [value][,key=value][,flag][,noflag]…
    keyval    -machine, -smp, -boot …       [value][,key=value]…, keys are dotted paths
    json      -object, -device, -incoming   {"key": value, …}

A leading value without a key belongs to the option's implied key.  A comma in a value is written
twice.  A flag means flag=on and noflag means flag=off; QEMU warns of both.  All results are dicts
in the order of the text, the last of equal keys wins, except that the first `id` does.

Errors are ConfigErrors that begin with the place, as "-m foo: …" or "guest.cfg:12: …".
"""

from __future__ import annotations

from cpr.config.option_values import (
    INT,
    SIZE,
    error,
    is_identifier,
    parse_int,
    parse_property,
    parse_size,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.option_values import Kind
    from cpr.errors import ConfigError

IDENTIFIER_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


class OptionGroup:
    """One option, or one group of a configuration file: its keys and where they stand.

    `values` are strings, or Python's values for JSON.  `dialect` is OPTS, KEYVAL or JSON.  `base`
    says that it is in guest.cfg, which options override.
    """

    __slots__ = ("base", "dialect", "location", "name", "values")

    def __init__(
        self, name: str, values: dict[str, Any], location: str, dialect: str, base: bool = False
    ) -> None:
        self.name = name
        self.values = values
        self.location = location
        self.dialect = dialect
        self.base = base

    def error(self, text: str) -> ConfigError:
        return error(self.location, text)

    def check_id(self) -> None:
        """Raises ConfigError where the id is not an identifier; there need not be one."""
        identifier = self.values.get("id")
        if identifier is None:
            return
        if not isinstance(identifier, str):
            raise self.error("Invalid parameter type for 'id', expected: string")
        if not is_identifier(identifier):
            raise self.error(f"Parameter 'id' expects an identifier\n{IDENTIFIER_HINT}")

    def typed(
        self, kinds: dict[str, Kind], unknown: str = "Invalid parameter '{}'"
    ) -> dict[str, Any]:
        """The values as `kinds` says, which has every key that is allowed.

        Raises ConfigError; `unknown` is the text for another key.
        """
        values = {}
        for key, value in self.values.items():
            kind = kinds.get(key)
            if kind is None:
                raise self.error(unknown.format(key))
            values[key] = self._typed(kind, key, value)
        return values

    def _typed(self, kind: Kind, key: str, value: str) -> str | bool | int:
        try:
            if kind == INT:
                return parse_int(value)
            if kind == SIZE:
                return parse_size(value)
        except OverflowError:
            problem = "is too large for" if kind == INT else "is out of range for"
            raise self.error(f"Value '{value}' {problem} parameter '{key}'") from None
        except ValueError:
            expected = "a number"
            if kind == SIZE:
                expected = f"a non-negative number below 2^64\n{SIZE_HINT}"
            raise self.error(f"Parameter '{key}' expects {expected}") from None
        return parse_property(kind, key, value, self.dialect, self.location)


def parse_opts(
    text: str, implied: str | None, location: str, warnings: list[str]
) -> dict[str, Any]:
    """The opts dialect; warnings are added as whole lines."""
    values: dict[str, Any] = {}
    rest = text
    while rest:
        end = _key_end(rest)
        if rest[end : end + 1] == "=":
            key = rest[:end]
            value, rest = _take_value(rest[end + 1 :])
        else:
            word, rest = _take_value(rest)
            if implied is not None:
                key, value = implied, word
            else:
                key, value = _flag(word)
                warnings.append(
                    f"{location}: warning: short-form boolean option '{word}' deprecated\n"
                    f"Please use {key}={value} instead"
                )
        implied = None
        if key != "id" or key not in values:
            values[key] = value
    return values


def _flag(word: str) -> tuple[str, str]:
    if word.startswith("no") and len(word) > 2:
        return word[2:], "off"
    return word, "on"


def parse_keyval(text: str, implied: str, location: str) -> dict[str, Any]:
    """The keyval dialect; dotted keys stay as they are, see `nest`."""
    values: dict[str, Any] = {}
    first = True
    rest = text
    while rest:
        end = _key_end(rest)
        key, separator = rest[:end], rest[end : end + 1]
        if first and key and separator != "=":
            key, value, rest = implied, key, rest[end + 1 :]
        else:
            if not _is_path(key):
                raise error(location, f"Invalid parameter '{key}'")
            if separator != "=":
                raise error(location, f"Expected '=' after parameter '{key}'")
            value, rest = _take_value(rest[end + 1 :])
        first = False
        values[key] = value
    _check_paths(values, location)
    return values


def _key_end(text: str) -> int:
    """Where the key at the start of `text` ends: at the first '=' or ','."""
    comma, equals = text.find(","), text.find("=")
    if comma < 0 or 0 <= equals < comma:
        comma = equals
    return len(text) if comma < 0 else comma


def _take_value(text: str) -> tuple[str, str]:
    """A value at the start of `text`, and what comes after its comma."""
    at = text.find(",")
    while at >= 0 and text[at + 1 : at + 2] == ",":
        at = text.find(",", at + 2)
    if at < 0:
        return text.replace(",,", ","), ""
    return text[:at].replace(",,", ","), text[at + 1 :]


def _is_path(key: str) -> bool:
    """Names and numbers with dots between; the first is a name."""
    parts = key.split(".")
    if not key.isascii() or not parts[0][:1].isalpha():
        return False
    return all(
        part.isdigit() or (part[:1].isalpha() and part.replace("-", "").replace("_", "").isalnum())
        for part in parts
    )


def _check_paths(values: dict[str, Any], location: str) -> None:
    """Refuses a key that has a value and also keys below it."""
    for key in values:
        dot = key.find(".")
        while dot >= 0:
            if key[:dot] in values:
                raise error(location, f"Parameters '{key[:dot]}.*' used inconsistently")
            dot = key.find(".", dot + 1)


def nest(values: dict[str, Any]) -> dict[str, Any]:
    """The tree of dotted keys: dicts, and lists where all keys of one level are numbers."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return {key: _with_lists(value) for key, value in tree.items()}


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if all(key.isdigit() for key in node):
        return [_with_lists(node[key]) for key in sorted(node, key=int)]
    return {key: _with_lists(value) for key, value in node.items()}


def quote(value: str) -> str:
    """`value` as it is written after key= in the opts and keyval dialects."""
    return value.replace(",", ",,")


def is_uri(text: str) -> bool:
    """Whether an -incoming begins with `scheme:`, and so is not a channel."""
    scheme, colon, _ = text.partition(":")
    return bool(colon) and all(character.isalnum() or character in "+-." for character in scheme)
