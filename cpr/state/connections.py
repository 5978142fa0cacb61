"""Connections that go over an update: what is known of each, as JSON, and their descriptors.

    {"chardev:ID": …, "monitor:ID of its chardev": …, "passed": …}

A descriptor's name is that of its connection, a colon, and what it is there: "chardev:qmp:peer".
Bytes are text with one character (U+0000 to U+00FF) for each.
"""

from __future__ import annotations

import json
import os

from cpr.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

NAME = "cpr-connections"
"""Of the memfd with the JSON, and in the CPR state of a late update."""

MOST = 1 << 30
"""Bytes of the JSON: far more than what may wait for all clients."""


class Kept:
    """One connection: its `data`, and its descriptors by what they are.

    The descriptors are the caller's where it is made to be saved, and this object's until `take`
    or `close` where it has come from another image.
    """

    def __init__(self, data: dict[str, Any], fds: dict[str, int] | None = None) -> None:
        self.data = data
        self.fds = fds or {}

    def take(self, role: str) -> int:
        """The descriptor and its ownership; -1 where there is none."""
        return self.fds.pop(role, -1)

    def close(self) -> None:
        """Closes what nobody has taken."""
        while self.fds:
            os.close(self.fds.popitem()[1])


def text(data: bytes | bytearray) -> str:
    return data.decode("latin-1")


def raw(text: str) -> bytes:
    return text.encode("latin-1")


def encode(kept: dict[str, Kept]) -> bytes:
    """The JSON.  Strings of a QMP client may have lone surrogates in them."""
    document = {name: each.data for name, each in kept.items()}
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def descriptors(kept: dict[str, Kept]) -> list[tuple[str, int, int]]:
    """As of the CPR state: (name, 0, fd)."""
    return [
        (f"{name}:{role}", 0, fd) for name, each in kept.items() for role, fd in each.fds.items()
    ]


def decode(data: bytes, fds: Iterable[tuple[str, int, int]]) -> dict[str, Kept]:
    """The inverse of both; of `fds` it owns those that are a connection's.  Raises StateError."""
    try:
        document = json.loads(data.decode("utf-8", "surrogatepass"))
        kept = {name: Kept(dict(each)) for name, each in document.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise StateError(f"what came of the connections is none: {error}") from None
    for name, _, fd in fds:
        owner, _, role = name.rpartition(":")
        if owner in kept:
            kept[owner].fds[role] = fd
    return kept
