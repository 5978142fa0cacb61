"""What the old program tells the new one: first what there is, then the state and what was left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from cpr.live import hooks, image, last_words, notify, payload
from cpr.live.errors import UpdateError
from cpr.live.preserved import Entry
from cpr.live.transaction import HAND_OVER, STATE

Send = Callable[[str, dict[str, Any], Sequence[int]], None]


class Said:
    """Of one update of this program, which had the PID `pid` before."""

    def __init__(self, this: image.Image, pid: int) -> None:
        self._image = this
        self._pid = pid
        self.sent: dict[str, Entry] = {}
        """The names whose descriptors the header had, as they were."""

    def header(self, send: Send, blocked: list[int], refusal: str, stderr: int) -> None:
        """The names, while this program goes on; `stderr` is the real one, or -1.

        It may be said again, to another new program.  Raises UpdateError, and what `send` raises.
        """
        this, entries = self._image, self._image.registry.entries
        names = this.registry.describe()
        this.registry.remember(False)
        fds = [entry.fd for entry in entries.values()]
        self.sent = dict(entries)
        body = {
            "pid": self._pid,
            "argv": this.argv,
            "started": this.started,
            "generation": this.generation,
            "version": this.save_version if this.saver is not None else 0,
            "saver": hooks.name_of(this.saver),
            "names": names,
            "blocked": blocked,
            "failure": refusal,
        }
        if stderr >= 0:
            body["stderr"], fds = True, [stderr, *fds]
        send(STATE, body, fds)

    def rest(self, send: Send, rehearsing: bool) -> None:
        """The state, and the names that have come since.  Raises UpdateError."""
        this, entries = self._image, self._image.registry.entries
        writer = payload.Writer()
        try:
            value = hooks.call("on_save", this.saver) if this.saver is not None else None
            state = writer.add_value(value, f"what {hooks.name_of(this.saver)} returned")
            parts = {name: part(writer) for name, part in this.parts.items()}
            last_words.flush()  # this program may end without another chance
            names = this.registry.describe()
            if not rehearsing:
                found = [why for obstacle in this.obstacles if (why := obstacle())]
                if found:
                    raise UpdateError("; ".join(found))
            if not rehearsing or threading.active_count() == 1:
                this.registry.remember(True)
            fresh = [name for name, entry in entries.items() if self.sent.get(name) is not entry]
            body = {
                "names": names,
                "fresh": fresh,
                "state": state,
                "parts": parts,
                "stored": sorted(notify.stored()),
            }
            send(HAND_OVER, body, [writer.fd, *(entries[name].fd for name in fresh)])
        finally:
            writer.close()
