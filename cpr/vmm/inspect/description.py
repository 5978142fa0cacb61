"""The description that a stream has of its devices' fields, in JSON at its end."""

from __future__ import annotations

import json
import re

from cpr.vmm.inspect.cursor import Cursor, Damage

Devices = dict[tuple[str, int], dict]
"""The description of each device, by its name and instance_id."""

BEGINS = re.compile(rb'\x00\x06(....)(?=\{\s*"(?:configuration|page_size|devices)")', re.DOTALL)


def find(cursor: Cursor) -> Devices:
    """The description at the end of the stream, after `cursor`; empty where it cannot be used.

    Of several places that look like one it is the last: guest RAM may hold anything.
    """
    match = None
    for each in BEGINS.finditer(cursor.data, cursor.offset):
        match = each
    if match is None:
        return {}
    size = int.from_bytes(match[1], "big")
    text = cursor.data[match.end() : match.end() + size]
    try:
        return parse(text, match.end())
    except Damage:
        return {}  # it is reported when its turn comes


def parse(text: bytes, offset: int) -> Devices:
    """The devices in `text`, which is at `offset`.  Raises Damage."""
    try:
        description = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise Damage(offset, f"the description is not JSON: {error}") from None
    try:
        return {(each["name"], each["instance_id"]): each for each in description["devices"]}
    except (KeyError, TypeError):
        raise Damage(offset, "the description does not describe any devices") from None
