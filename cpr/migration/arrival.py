"""The new VMM's side of an early update, between hello and commit; see `early`."""

from __future__ import annotations

from cpr.constants import PROGRAM_VERSION
from cpr.errors import MigrationError
from cpr.faults import point
from cpr.live.transaction import END, HAND_OVER, READY, REHEARSE, STATE, UpdateError
from cpr.migration import savevm
from cpr.migration.capabilities import Capabilities
from cpr.migration.channel import MemoryChannel
from cpr.migration.hand_over import decode_state, differences
from cpr.migration.loadvm import Loader
from cpr.migration.mode import EXEC, KeepsRam
from cpr.migration.placement import Placement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

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
        self._stream = b""
        self._beginning = b""
        self._loader: Loader | None = None
        self._native = False
        self.placement = Placement((), (), ())
        self.old_pid = 0
        """The PID that the update is for, where the old VMM has said it."""
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
        self.old_pid = int(message.body.get("pid", 0))
        own, away, vcpus = message.body["placement"]
        self.placement = Placement(own, away, vcpus, message.body.get("nice", ()))
        self.failure = str(message.body["failure"])
        self._sections = {(idstr, instance) for idstr, instance in message.body["sections"]}
        self._stream = message.data
        fds.take_over(decode_state(message))

    def check(self, machine: Machine) -> None:
        """Raises MigrationError with all that speaks against taking the guest over."""
        reasons = differences(machine, self._guest)
        if reasons:
            raise MigrationError("; ".join(reasons))
        machine.accel.adopt_cpu_model(self._cpu)
        layout = machine.accel.native_layout()
        self._native = layout is not None and layout == self._guest.get("native")
        self.placement.place(machine.threads)

    def rehearsed(self) -> None:
        """This VMM could take over: says so, and waits to be thanked.  Does not come back."""
        self._predecessor.send(READY)
        self._predecessor.receive(END)

    def load_sections(self, machine: Machine) -> None:
        """Loads what the old VMM could save while the guest runs.  Raises CprError."""
        self._loader = Loader(machine, Capabilities())
        self._load(self._loader)

    def _load(self, loader: Loader) -> None:
        if self._sections:
            loader.load(MemoryChannel(self._stream), described=False, complete=False)
            self._beginning = self._stream[: loader.devices_offset]

    def load_again(self, machine: Machine) -> None:
        """Does most of what the hand-over will do, on the CPUs where that will be.

        What is in their caches need not be fetched while the guest stands still.  The sections are
        those of `load_sections`, and what a vCPU has it is given again: nothing changes.
        """
        assert self._loader is not None
        self.placement.hand_over()
        if self._native:
            savevm.warm_up_native(machine, KeepsRam(EXEC))
        self._load(self._loader)
        self._stream = b""

    def receive_guest(self, fds: PreservedFds) -> Callable[[], str]:
        """Says that all is ready, and waits for the guest, after `load_sections`.

        Returns what loads the rest of it, and returns the run state that it was in.
        """
        loader = self._loader
        assert loader is not None
        self._predecessor.send(READY, {"native": self._native})
        message = self._predecessor.receive(HAND_OVER)
        if message.body["changed"]:
            renewed = {(name, id) for name, id in message.body["renewed"]}
            fds.replace(decode_state(message), renewed)
        kept = {(idstr, instance) for idstr, instance in message.body["kept"]}
        if not kept <= self._sections:
            raise MigrationError("the old VMM leaves out sections that it has never sent")
        size = len(self._beginning)  # the guest stands still: what has been checked is passed over
        begun = size > 0 and message.data.startswith(self._beginning)
        source = MemoryChannel(message.data[size:] if begun else message.data)
        return lambda: loader.load(source, described=False, loaded=kept, begun=begun)

    def commit(self) -> None:
        """The guest is this VMM's.  Ends the process where the old VMM has ended meanwhile."""
        try:
            self._predecessor.commit()
        except UpdateError:
            self._predecessor.receive(END)
            raise
