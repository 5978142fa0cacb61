"""Comparing what a row expects with what was seen.

An expectation is a plain value, compared exactly, or has one of these inside it:

    "…$name…"     a text; $name stands for the value that the row has for it
    like(REGEX)   a text that the whole of REGEX matches; $name as above
    ANY           anything
    int, str, …   any value of that type
    has({…})      a dict with at least these keys
"""

from __future__ import annotations

import re
from string import Template
from typing import Any

OWN_LINES = "Update: "
"""Begins lines of `info migrate` that no QEMU has."""


class Mismatch(AssertionError):
    """What was seen is not what the row expects."""


class Unavailable(Exception):
    """This machine lacks what the row needs; the text says what."""


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY = _Any()


class like:
    """A text matched by a regular expression."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __repr__(self) -> str:
        return f"like({self.pattern!r})"


class has:
    """A dict with at least these keys."""

    def __init__(self, keys: dict[str, Any]) -> None:
        self.keys = keys

    def __repr__(self) -> str:
        return f"has({self.keys!r})"


def fill(text: str, names: dict[str, str]) -> str:
    """`text` with each $name of `names` replaced; other dollars stay."""
    return Template(text).safe_substitute(names)


def matches(expected: Any, seen: Any, names: dict[str, str]) -> bool:
    """Whether `seen` is what `expected` describes."""
    if expected is ANY:
        return True
    if isinstance(expected, type):
        return isinstance(seen, expected) and not (expected is int and isinstance(seen, bool))
    if isinstance(expected, like):
        escaped = {name: re.escape(value) for name, value in names.items()}
        pattern = fill(expected.pattern, escaped)
        return isinstance(seen, str) and re.fullmatch(pattern, seen, re.DOTALL) is not None
    if isinstance(expected, str):
        return bool(seen == fill(expected, names))
    if isinstance(expected, has):
        return isinstance(seen, dict) and all(
            key in seen and matches(value, seen[key], names) for key, value in expected.keys.items()
        )
    if isinstance(expected, dict):
        return (
            isinstance(seen, dict)
            and seen.keys() == expected.keys()
            and matches(has(expected), seen, names)
        )
    if isinstance(expected, list | tuple):
        return (
            isinstance(seen, list | tuple)
            and len(seen) == len(expected)
            and all(matches(one, two, names) for one, two in zip(expected, seen, strict=True))
        )
    return type(expected) is type(seen) and bool(expected == seen)


def expect(what: str, expected: Any, seen: Any, names: dict[str, str]) -> None:
    """Raises Mismatch where `seen` is not what `expected` describes."""
    if not matches(expected, seen, names):
        shown = fill(repr(expected), names)
        raise Mismatch(f"{what}\n    expected {shown}\n    seen     {seen!r}")
