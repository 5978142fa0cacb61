"""Steps that start a VMM on what another one left behind: descriptors, CPR state and stream."""

from __future__ import annotations

import os
from collections.abc import Callable

from . import cpr_state
from .capture import memfd
from .cpr_state import Entry
from .lab import STATE_VARIABLE, Lab
from .row import step
from .steps import INCOMING, guest
from .stream import Stream

STATE_FD = 400
"""The number of the memfd with the CPR state; away from those that a VMM preserves."""

MARK_AT = 0x90000
MARK = 0x5AA5C33C
"""A word that is put into the RAM that a VMM takes over: a new boot leaves it alone."""

MakeState = Callable[[list[Entry]], bytes]
Damage = Callable[[Stream], bytes]


def whole(stream: Stream) -> bytes:
    return stream.data


@step
def take_over(
    lab: Lab,
    state: MakeState | None = cpr_state.encode,
    stream: Damage = whole,
    options: str = guest(),
    more: str = INCOMING,
    variable: str = str(STATE_FD),
    ram_size: int | None = None,
) -> None:
    """Starts a VMM as an exec would have: its memfds at their numbers, the state, the stream.

    `state` makes the CPR state of the entries, None for a start without one; `stream` damages the
    stream; `variable` goes into the environment; `ram_size` is another size of the RAM's memfd.
    """
    capture = lab.target.capture
    lab.names |= capture.stream.names()
    lab.path("$dir/state").write_bytes(stream(capture.stream))
    files, environment = [], {}
    for number, content in capture.contents.items():
        if number == capture.ram_fd:
            content = _mark(content, ram_size or len(content))
        files.append((os.POSIX_SPAWN_DUP2, memfd(lab, content), number))
    if state is not None:
        data = state(capture.entries)
        files.append((os.POSIX_SPAWN_DUP2, memfd(lab, data), STATE_FD))
        environment[STATE_VARIABLE] = variable
    lab.start("vm", f"{options} {more}", environment=environment, files=files)
    lab.vm.count = capture.count


def _mark(ram: bytes, size: int) -> bytes:
    marked = ram[:MARK_AT] + MARK.to_bytes(4, "little") + ram[MARK_AT + 4 :]
    return marked[:size].ljust(size, b"\0")


# Ways to damage a stream.


def cut(at: Callable[[Stream], int]) -> Damage:
    """The stream up to an offset."""
    return lambda stream: stream.data[: at(stream)]


def replace(at: Callable[[Stream], int], new: bytes) -> Damage:
    """The stream with other bytes at an offset."""
    return lambda stream: stream.put(at(stream), new)


def without(old: Callable[[Stream], bytes]) -> Damage:
    """The stream without some bytes."""
    return lambda stream: stream.data.replace(old(stream), b"", 1)
