"""One value of QEMU's JSON, decoded by the standard library, and QEMU's words for what is wrong.

The errors name a token, not a position: the library sees the text in the standard's quotes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# Of a value whose tokens are right one by one.
TOKEN = re.compile(
    r"""[{}\[\],:]|"(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+'|[^\s{}\[\],:"']++""", re.ASCII
)
# Surrogates come in pairs, and noncharacters are none.
ESCAPE = (
    r"""\\["'\\/bfnrt]"""
    r"|\\u(?![dD][89a-fA-F]|[fF]{3}[efEF]|[fF][dD][deDE])[0-9a-fA-F]{4}"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
RIGHT = re.compile(rf"(?:[^\\]++|{ESCAPE})*+")  # in one go: a message may have millions
NO_CHARACTER = "\0"  # of a string
WRONG = re.compile(r"\\u.{0,4}|\\.")


class Broken(Exception):
    """What is wrong with a value, and the number of the token with which it is."""

    def __init__(self, token: int, text: str) -> None:
        super().__init__(text)
        self.token = token
        self.text = text

    def offset(self, raw: bytes) -> int:
        """Where in `raw` the token begins."""
        return [token.start() for token in TOKEN.finditer(raw.decode("latin-1"))][self.token]


def decode(raw: bytes) -> Any:
    """Raises Broken for what is no value."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        token = _token_at(raw.decode("latin-1"), error.start)
        raise Broken(token, "invalid UTF-8 sequence in string") from None
    right = RIGHT.match(text)
    assert right is not None
    if (position := right.end()) < len(text):
        found = WRONG.match(text, position)
        assert found is not None
        problem = f"{found[0]} is not a valid Unicode character"
        problem = problem if found[0][1] == "u" else "invalid escape sequence in string"
        raise Broken(_token_at(text, position), problem)
    if "'" in text:
        text = TOKEN.sub(_double_quoted, text)
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _syntax_error(text, error) from None
    except _TooLarge as error:
        number = TOKEN.findall(text).index(str(error))
        raise Broken(number, f"number {error} is too large") from None
    except _DuplicateKey as error:
        raise Broken(_second_value(text, str(error)), "duplicate key") from None


def _double_quoted(token: re.Match[str]) -> str:
    """A token as the standard has it."""
    if token[0][0] not in "\"'":
        return token[0]
    body = token[0][1:-1].replace("\\\\", NO_CHARACTER)
    body = body.replace("\\'", "'").replace('\\"', '"').replace('"', '\\"')
    return '"' + body.replace(NO_CHARACTER, "\\\\") + '"'


def _token_at(text: str, position: int) -> int:
    return sum(token.start() <= position for token in TOKEN.finditer(text)) - 1


def _syntax_error(text: str, error: json.JSONDecodeError) -> Broken:
    tokens = TOKEN.findall(text)
    number = _token_at(text, error.pos)
    trailing = error.msg.startswith("Illegal trailing comma")  # so since Python 3.13
    number += trailing
    found = tokens[number]
    if "property name" in error.msg or (trailing and "object" in error.msg):
        return Broken(number, "expecting key")
    if "':'" in error.msg:
        return Broken(number, "expecting ':'")
    if "','" in error.msg:
        opened = []
        for token in tokens[:number]:
            if token in "{[":
                opened.append(token)
            elif token in "}]":
                opened.pop()
        return Broken(number, f"expected ',' or '{'}' if opened[-1] == '{' else ']'}'")
    return Broken(number, f"invalid keyword '{found}'" if found.isalpha() else "expecting value")


def _second_value(text: str, key: str) -> int:
    """The token with which a key has its value for the second time, as far as it can be told."""
    tokens = TOKEN.findall(text)
    shown = json.dumps(key, ensure_ascii=False)
    values = [
        i + 2 for i, token in enumerate(tokens[:-2]) if token == shown and tokens[i + 1] == ":"
    ]
    return values[1] if len(values) > 1 else len(tokens) - 1


class _DuplicateKey(Exception):
    pass


class _TooLarge(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise _DuplicateKey(key)
        members[key] = value
    return members


def _integer(digits: str) -> int | float:
    """One that does not fit into 64 bits is a float, as in QEMU."""
    number = int(digits) if len(digits) <= 20 else 1 << 64
    return number if -(1 << 63) <= number < 1 << 64 else _float(digits)


def _float(text: str) -> float:
    """Infinity could not be echoed."""
    if math.isinf(number := float(text)):
        raise _TooLarge(text)
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_float)
