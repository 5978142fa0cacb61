"""A command that waits for a program: the main loop goes on meanwhile, in rounds of its own."""

from __future__ import annotations

from cpr.constants import NS_PER_MS
from cpr.errors import MigrationError
from cpr.migration.cancellation import INTERRUPTED
from cpr.migration.capabilities import IN_PROGRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.machine import Machine

ROUND_NS = 2 * NS_PER_MS
ENDING = "the VM ends"


class Asking:
    """A context, for one command at a time: others, of other monitors, are done meanwhile.

    Entering it raises MigrationError where there is such a command already.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._active = self._cancelled = False

    def __enter__(self) -> None:
        if self._active:
            raise MigrationError(IN_PROGRESS)
        self._active, self._cancelled = True, False

    def __exit__(self, *exception: object) -> None:
        self._active = False

    def cancel(self) -> None:
        """Nothing happens where no command waits."""
        self._cancelled = True

    def serve(self) -> str:
        """A round of the main loop; then why the command is not to wait any longer, or ""."""
        machine = self._machine
        machine.loop.iterate(ROUND_NS)
        if machine.ends or machine.interrupted():
            return ENDING
        return INTERRUPTED if self._cancelled else ""
