"""The new VMM's side of an early update, between hello and commit; see `early`."""

from __future__ import annotations

import os

from cpr.constants import PROGRAM_VERSION
from cpr.errors import MigrationError
from cpr.faults import point
from cpr.live import sealed
from cpr.live.transaction import END, HAND_OVER, READY, REHEARSE, STATE, UpdateError
from cpr.migration import loadvm
from cpr.migration.capabilities import Capabilities
from cpr.migration.channel import Channel
from cpr.migration.hand_over import decode_state, differences
from cpr.migration.placement import Placement

MOST_STREAM = 64 << 20
"""Bytes of a hand-over's stream, which has no RAM in it."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.live.messages import Message
    from cpr.live.new_image import Predecessor
    from cpr.machine import Machine
    from cpr.state.fds import PreservedFds


class Arrival:
    """The new VMM's side of an early update, or of a rehearsal."""

    def __init__(self, predecessor: Predecessor) -> None:
        self._predecessor = predecessor
        self._guest: dict[str, Any] = {}
        self._cpu: Any = None
        self._sections: set[tuple[str, int]] = set()
        self._stream = -1
        self.placement = Placement((), (), ())
        self.failure = ""
        """Why an update failed whose old command this is; empty for a new program."""

    @property
    def rehearses(self) -> bool:
        return self._predecessor.mode == REHEARSE

    def receive_state(self, fds: PreservedFds) -> None:
        """Asks for the CPR state and takes it over.  Raises CprError."""
        point("ask")
        self._predecessor.hello(PROGRAM_VERSION)
        message = self._predecessor.receive(STATE)
        self._guest, self._cpu = message.body["guest"], message.body["cpu"]
        self.placement = Placement(*message.body["placement"])
        self.failure = str(message.body["failure"])
        self._sections = {(idstr, instance) for idstr, instance in message.body["sections"]}
        if self._sections:
            self._stream = _take_stream(message)
        fds.take_over(decode_state(message))

    def check(self, machine: Machine) -> None:
        """Raises MigrationError with all that speaks against taking the guest over."""
        reasons = differences(machine, self._guest)
        if reasons:
            raise MigrationError("; ".join(reasons))
        machine.accel.adopt_cpu_model(self._cpu)
        self.placement.place(machine.threads)

    def rehearsed(self) -> None:
        """This VMM could take over: says so, and waits to be thanked.  Does not come back."""
        self._predecessor.send(READY)
        self._predecessor.receive(END)

    def load_sections(self, machine: Machine) -> None:
        """Loads what the old VMM could save while the guest runs.  Raises CprError."""
        if self._stream < 0:
            return
        source, self._stream = Channel(self._stream, "file"), -1
        os.lseek(source.fd, 0, os.SEEK_SET)
        try:
            loadvm.load(machine, Capabilities(), source, described=False, complete=False)
        finally:
            source.close()

    def receive_guest(self, fds: PreservedFds) -> tuple[Channel, set[tuple[str, int]]]:
        """Says that all is ready, and waits for the guest.

        Returns its stream, which is the caller's, and the sections that are not in there, because
        nothing has changed in them since `load_sections`.
        """
        self._predecessor.send(READY)
        message = self._predecessor.receive(HAND_OVER)
        stream = _take_stream(message)
        os.lseek(stream, 0, os.SEEK_SET)
        if message.body["changed"]:
            renewed = {(name, id) for name, id in message.body["renewed"]}
            fds.replace(decode_state(message), renewed)
        kept = {(idstr, instance) for idstr, instance in message.body["kept"]}
        if not kept <= self._sections:
            raise MigrationError("the old VMM leaves out sections that it has never sent")
        return Channel(stream, "file"), kept

    def commit(self) -> None:
        """The guest is this VMM's.  Ends the process where the old VMM has ended meanwhile."""
        try:
            self._predecessor.commit()
        except UpdateError:
            self._predecessor.receive(END)
            raise


def _take_stream(message: Message) -> int:
    """The memfd in front of a message's descriptors, the caller's.

    Raises MigrationError for one that could still change; then no descriptor stays open.
    """
    try:
        sealed.check(message.fds[0], MOST_STREAM)
    except ValueError as error:
        message.close()
        raise MigrationError(str(error)) from None
    return message.fds.pop(0)
