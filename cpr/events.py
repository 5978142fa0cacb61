"""QMP events, from whoever raises them to every monitor that listens."""

from __future__ import annotations

import time

from cpr.constants import US_PER_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class EventBus:
    """Delivers events to its subscribers, in the order in which they are emitted.

    A subscriber is called in the emitting thread with the whole event,
    {"timestamp": {"seconds", "microseconds"}, "event": NAME[, "data": {…}]}, and must not block.
    """

    def __init__(self) -> None:
        self._subscribers: list[Callable[[dict], None]] = []
        self._held: list[dict] | None = None

    def hold(self) -> None:
        """Keeps what is emitted, for as long as nobody may wait for a subscriber.

        `release` is the inverse.
        """
        self._held = []

    def release(self) -> None:
        """Delivers what was kept; nothing happens where nothing is."""
        held, self._held = self._held, None
        for event in held or ():
            self._deliver(event)

    def subscribe(self, subscriber: Callable[[dict], None]) -> None:
        self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Callable[[dict], None]) -> None:
        self._subscribers.remove(subscriber)

    def emit(self, name: str, data: dict | None = None) -> None:
        now_us = time.time_ns() // 1000
        event: dict = {
            "timestamp": {"seconds": now_us // US_PER_S, "microseconds": now_us % US_PER_S},
            "event": name,
        }
        if data is not None:
            event["data"] = data
        if self._held is not None:
            self._held.append(event)
        else:
            self._deliver(event)

    def _deliver(self, event: dict) -> None:
        for subscriber in list(self._subscribers):
            subscriber(event)
