"""A rehearsal: the new program runs as a child up to ready, beside the guest, and is thanked.

It gets what an early update gives, builds its machine around the same descriptors, and touches
neither guest RAM nor a device.  The guest runs on; its devices are served while this waits, and
other monitors answer.
"""

from __future__ import annotations

import os
import select
import time

from cpr.constants import NS_PER_MS
from cpr.errors import CprError, MigrationError
from cpr.live.last_words import bound
from cpr.live.old_image import Update
from cpr.live.transaction import END, HELLO, RAM_FILES, READY, UpdateError
from cpr.migration import channel
from cpr.migration.child import starting, waited_for
from cpr.migration.hand_over import check_protocol, send_state
from cpr.migration.placement import Placement
from cpr.migration.program import Held, end_started
from cpr.report import carefully

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.state.fds import PreservedFds

END_MS = 5000  # for a program that was thanked
MOST_LINES = 5  # of the program's last words


class Rehearsed:
    """What a rehearsal has shown: `start_ms` is how long the program took to be ready, or None."""

    def __init__(self, refusals: list[str], start_ms: int | None) -> None:
        self.refusals = refusals
        self.start_ms = start_ms


def rehearse(
    machine: Machine,
    fds: PreservedFds,
    serve: Callable[[], str],
    command: list[str],
    timeout_ms: int,
) -> Rehearsed:
    """Starts `command` and waits until it is ready, refuses, ends, or the time is over.

    `serve()` is called meanwhile, and ends it with what it says against going on.  Raises
    MigrationError where it cannot even be started.
    """
    try:
        update = Update()
    except UpdateError as error:
        raise MigrationError(str(error)) from None
    began = time.monotonic_ns()
    try:
        placement = Placement.of(machine.threads)
        placement.keep_away()
        try:
            with starting:
                update.spawn(command, os.environ, channel.reap_later)
                waited_for.add(update.pid)
        finally:
            placement.give_back(machine.threads)
        try:
            refusal = _converse(machine, fds, serve, update, timeout_ms, placement)
            took = (time.monotonic_ns() - began) // NS_PER_MS
            if refusal is None:
                update.send(END, {"status": 0})
                end = time.monotonic_ns() + END_MS * NS_PER_MS
                while not update.is_dead(0) and not serve() and time.monotonic_ns() < end:
                    pass
        finally:
            status, words = update.end_child()
            waited_for.discard(update.pid)
            carefully(lambda: end_started(Held(update.page.fd)))
    except UpdateError as error:
        raise MigrationError(str(error)) from None
    finally:
        update.close()
    if refusal is None:
        return Rehearsed([], took)
    if refusal == "":
        last = "; ".join(words.splitlines()[-MOST_LINES:])
        what = "hung up, and does not end" if status is None else f"ended with exit status {status}"
        refusal = f"the new program has {what}: {last}"
    return Rehearsed([refusal], None)


def _converse(
    machine: Machine,
    fds: PreservedFds,
    serve: Callable[[], str],
    update: Update,
    timeout_ms: int,
    placement: Placement,
) -> str | None:
    """What the new program says against the update: None for nothing, "" where it has ended."""
    deadline = time.monotonic_ns() + timeout_ms * NS_PER_MS
    poll = select.poll()
    poll.register(update.fileno(), select.POLLIN)
    poll.register(update.pidfd, select.POLLIN)
    while True:
        if reason := serve():
            return reason
        bound()
        ready = [fd for fd, _ in poll.poll(0)]
        if update.fileno() in ready:
            try:
                message = update.receive()
            except CprError:
                return ""
            message.close()
            if message.kind == HELLO:
                check_protocol(message)
                files = RAM_FILES in message.body.get("versions", [])
                send_state(update, machine, fds.state(files), "", placement)
            elif message.kind == READY:
                return None
            else:
                update.send(END, {"status": 1})
                return message.reason
        elif ready:
            return ""
        elif timeout_ms and time.monotonic_ns() > deadline:
            return f"the new program is not ready after {timeout_ms} ms"
