"""Live update of a process by exec, as a transaction; `transaction` tells it from top to bottom.

A program that wants to update itself uses the names here (see docs/live.md):

    from cpr import live

    sock = live.socket("web", lambda: socket.create_server(("", 8000)))
    count = live.state(default=0)
    live.on_save(lambda: count)
    live.update_on(signal.SIGHUP)
    live.ready()

`live.generation` is how many updates this program has had, 0 at first, and `live.predecessor`
is the program before it, or None.  Nothing here knows of VMs, and nothing is imported before it is
used.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.live import aio as aio
    from cpr.live import notify as notify
    from cpr.live import testing as testing
    from cpr.live.api import *  # noqa: F403
    from cpr.live.image import Previous

    generation: int
    predecessor: Previous | None

NAMES = (
    "Finding",
    "PreserveError",
    "Previous",
    "UpdateError",
    "Verdict",
    "audit",
    "drop",
    "fd",
    "file",
    "get",
    "keep",
    "memory",
    "names",
    "on_pause",
    "on_resume",
    "on_save",
    "ready",
    "rehearse",
    "socket",
    "state",
    "update",
    "update_on",
)
"""Those of `api`, said here because every import of a module below asks for a name first."""

MODULES = ("aio", "notify", "testing")
VALUES = ("generation", "predecessor")

try:
    _folder = os.getcwd()  # where the program was started, unless it has changed it before
except OSError:
    _folder = "/"


_pid = os.getpid()  # of who was started; a child has another


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in MODULES:
        return import_module(f"cpr.live.{name}")
    if name in NAMES:
        globals()[name] = value = getattr(import_module("cpr.live.api"), name)
        return value
    if name in VALUES:
        return getattr(import_module("cpr.live.api"), name)()
    raise AttributeError(f"module 'cpr.live' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted((*NAMES, *MODULES, *VALUES))
