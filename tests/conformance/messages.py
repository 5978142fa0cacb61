"""Following what a QMP connection says against what a row expects to come."""

from __future__ import annotations

import json
from typing import Any

from harness.qmp import Closed, Qmp

from .match import Mismatch, fill, matches

REPLY = "{}"
MAIN_LOOP = ("STOP",)
"""Events that come from where replies come from, and so cannot overtake one."""


class maybe:
    """A message that comes or does not."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __repr__(self) -> str:
        return f"maybe({self.message!r})"


def abbreviate(message: dict[str, Any]) -> str:
    """A message in the short form that rows use.

    A MIGRATION event is its status, MIGRATION_PASS "pass:N", SHUTDOWN "SHUTDOWN reason", another
    event its name; a reply is its JSON, an error "error: text".
    """
    if "error" in message:
        return f"error: {message['error']['desc']}"
    if "event" not in message:
        return json.dumps(message["return"])
    name, data = message["event"], message.get("data", {})
    if name == "MIGRATION":
        return str(data["status"])
    if name == "MIGRATION_PASS":
        return f"pass:{data['pass']}"
    if name == "SHUTDOWN":
        return f"SHUTDOWN {data['reason']}"
    return str(name)


class Follower:
    """Takes messages one by one.

    The reply "{}" comes not before its place, but events of the migration's thread may overtake it.
    """

    def __init__(self, expected: tuple, names: dict[str, str]) -> None:
        self._expected = expected
        self._names = names
        self._at = 0
        self._reply_due = False
        self._seen: list[str] = []

    @property
    def satisfied(self) -> bool:
        return self._at == len(self._expected) and not self._reply_due

    def take(self, message: str) -> None:
        """Raises Mismatch where `message` is not what comes next."""
        self._seen.append(message)
        if self._reply_due and message == REPLY:
            self._reply_due = False
            return
        while self._at < len(self._expected):
            expected = self._expected[self._at]
            self._at += 1
            if isinstance(expected, maybe):
                if matches(expected.message, message, self._names):
                    return
            elif matches(expected, message, self._names):
                return
            elif expected == REPLY and message not in MAIN_LOOP:
                self._reply_due = True
            else:
                break
        shown = [fill(repr(each), self._names) for each in self._expected]
        raise Mismatch(f"messages\n    expected {', '.join(shown)}\n    seen     {self._seen}")


def follow(connection: Qmp, expected: tuple[Any, ...], names: dict[str, str]) -> None:
    """Raises Mismatch unless exactly the expected messages come."""
    follower = Follower(expected, names)
    while not follower.satisfied:
        follower.take(_next(connection))


def _next(connection: Qmp) -> str:
    if connection.events:
        return abbreviate(connection.events.pop(0))
    try:
        return abbreviate(connection.read())
    except Closed:
        return "EOF"
    except TimeoutError:
        return "nothing"
