"""Options in JSON, and the migration channels of -incoming, which come in JSON or keyval.

Imported only where one is given.
"""

from __future__ import annotations

import json

from cpr.config.option_values import error
from cpr.config.options import is_uri, nest, parse_keyval

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def parse_json(text: str, location: str) -> dict[str, Any]:
    """A JSON object; `text` begins with '{'."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise error(location, "JSON parse error, duplicate key")
        return dict(pairs)

    try:
        value: dict[str, Any] = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as problem:
        raise error(location, _json_problem(text, problem)) from None
    except (ValueError, RecursionError):
        raise error(location, "JSON parse error, number or nesting too large") from None
    return value


def _json_problem(text: str, problem: json.JSONDecodeError) -> str:
    if problem.msg == "Extra data":
        return "Expecting at most one JSON value"
    position, found = problem.pos, text[problem.pos :]
    if position >= len(text.rstrip()) - 1 and not found.startswith("}"):
        position, reason = len(text), "premature end of input"
    elif found[0].isalpha():
        word = found[: next((i for i, c in enumerate(found) if not c.isalnum()), len(found))]
        reason = f"invalid keyword '{word}'"
    elif "property name" in problem.msg:
        reason = "expecting key"
    elif "':'" in problem.msg:
        reason = "expecting ':'"
    elif "','" in problem.msg:
        reason = "expected ',' or '}'"
    else:
        reason = "expecting value" if found[0] in "]}:," else f"stray '{found[0]}'"
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"{line}:{column}: JSON parse error, {reason}"


def parse_channel(text: str, location: str = "-incoming") -> dict[str, Any] | None:
    """A migration channel of -incoming as QEMU's MigrationChannel; None for a URI and for defer.

    `{"channel-type": "main", "addr": {"transport": …}}`, from JSON or from keyval; with keyval all
    values are strings.
    """
    if text.startswith("{"):
        channel = parse_json(text, location)
    elif text == "defer" or is_uri(text):
        return None
    else:
        channel = nest(parse_keyval(text, "channel-type", location))
    if "channel-type" not in channel:
        raise error(location, "Parameter 'channel-type' is missing")
    kind = channel["channel-type"]
    if kind not in ("main", "cpr"):
        raise error(location, f"Parameter 'channel-type' does not accept value '{kind}'")
    if "addr" not in channel:
        raise error(location, "Parameter 'addr' is missing")
    if not isinstance(channel["addr"], dict):
        raise error(location, "Invalid parameter type for 'addr', expected: object")
    for key in channel:
        if key not in ("channel-type", "addr"):
            raise error(location, f"Parameter '{key}' is unexpected")
    return channel
