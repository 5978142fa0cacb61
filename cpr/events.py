"""QMP events, from whoever raises them to every monitor that listens."""

from __future__ import annotations

import time
from _thread import allocate_lock

from cpr.constants import US_PER_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


MOST_KEPT = 1000  # a guest can cause them, and memory is the host's


class EventBus:
    """Delivers events to its subscribers, in the order in which they are emitted.

    A subscriber is called in the emitting thread with the whole event,
    {"timestamp": {"seconds", "microseconds"}, "event": NAME[, "data": {…}]}, and must not block.

    Until `forget` it keeps the first MOST_KEPT, for clients that were there before this image.
    """

    def __init__(self) -> None:
        self._subscribers: list[Callable[[dict], None]] = []
        self._lock = allocate_lock()
        self._past: list[dict] | None = []
        self.last_us = 0
        """When the last event was emitted, of the host's wall clock."""
        self._held: list[dict] | None = None

    def hold(self) -> None:
        """Keeps what is emitted, for as long as nobody may wait for a subscriber.

        `release` is the inverse.
        """
        self._held = []

    def release(self) -> None:
        """Delivers what was kept; nothing happens where nothing is."""
        with self._lock:
            held, self._held = self._held, None
            subscribers = list(self._subscribers)
        for event in held or ():
            for subscriber in subscribers:
                subscriber(event)

    def subscribe(self, subscriber: Callable[[dict], None], from_start: bool = False) -> None:
        """`from_start`: it also gets all that has been emitted before."""
        with self._lock:
            for event in (self._past or []) if from_start else []:
                subscriber(event)
            self._subscribers.append(subscriber)

    def not_before(self, last_us: int) -> None:
        """The old image has emitted its last event then, maybe when this one's guest ran already:
        no client is told of one that is older than the one before it."""
        with self._lock:
            for event in self._past or []:
                stamp = event["timestamp"]
                if stamp["seconds"] * US_PER_S + stamp["microseconds"] < last_us:
                    event["timestamp"] = _timestamp(last_us)

    def forget(self) -> None:
        """There is nobody any more who would want to know what has been emitted before."""
        self._past = None

    def unsubscribe(self, subscriber: Callable[[dict], None]) -> None:
        self._subscribers.remove(subscriber)

    def emit(self, name: str, data: dict | None = None) -> None:
        self.last_us = time.time_ns() // 1000
        event: dict = {"timestamp": _timestamp(self.last_us), "event": name}
        if data is not None:
            event["data"] = data
        with self._lock:
            if self._past is not None and len(self._past) < MOST_KEPT:
                self._past.append(event)
            if self._held is not None:
                self._held.append(event)
                return
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            subscriber(event)


def _timestamp(us: int) -> dict[str, int]:
    return {"seconds": us // US_PER_S, "microseconds": us % US_PER_S}
