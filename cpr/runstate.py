"""RunState: what the whole VM is doing, as QEMU's query-status names it.

The table below is literal: a transition that is not in it is a bug in the caller and raises.
"""

from __future__ import annotations

PRELAUNCH = "prelaunch"
INMIGRATE = "inmigrate"
RUNNING = "running"
PAUSED = "paused"
SUSPENDED = "suspended"
FINISH_MIGRATE = "finish-migrate"
POSTMIGRATE = "postmigrate"
RESTORE_VM = "restore-vm"
SHUTDOWN = "shutdown"
INTERNAL_ERROR = "internal-error"
IO_ERROR = "io-error"

TRANSITIONS: dict[str, frozenset[str]] = {
    PRELAUNCH: frozenset({INMIGRATE, RUNNING, PAUSED, SUSPENDED, FINISH_MIGRATE, SHUTDOWN}),
    INMIGRATE: frozenset(
        {RUNNING, PAUSED, PRELAUNCH, SUSPENDED, POSTMIGRATE, SHUTDOWN, INTERNAL_ERROR, IO_ERROR}
    ),
    RUNNING: frozenset(
        {PAUSED, SUSPENDED, FINISH_MIGRATE, POSTMIGRATE, SHUTDOWN, INTERNAL_ERROR, IO_ERROR}
    ),
    PAUSED: frozenset({RUNNING, SUSPENDED, FINISH_MIGRATE, POSTMIGRATE, PRELAUNCH, SHUTDOWN}),
    SUSPENDED: frozenset(
        {
            RUNNING,
            PAUSED,
            FINISH_MIGRATE,
            POSTMIGRATE,
            PRELAUNCH,
            SHUTDOWN,
            INTERNAL_ERROR,
            IO_ERROR,
        }
    ),
    FINISH_MIGRATE: frozenset(
        {
            *(RUNNING, PAUSED, POSTMIGRATE, PRELAUNCH, SUSPENDED, SHUTDOWN),
            *(INTERNAL_ERROR, IO_ERROR),
        }
    ),
    POSTMIGRATE: frozenset({RUNNING, SUSPENDED, FINISH_MIGRATE, PAUSED, PRELAUNCH, SHUTDOWN}),
    SHUTDOWN: frozenset({PAUSED, FINISH_MIGRATE, PRELAUNCH, POSTMIGRATE}),
    INTERNAL_ERROR: frozenset({PAUSED, FINISH_MIGRATE, PRELAUNCH, SHUTDOWN}),
    IO_ERROR: frozenset({RUNNING, SUSPENDED, PAUSED, FINISH_MIGRATE, PRELAUNCH, SHUTDOWN}),
}

LIVE = frozenset({RUNNING, SUSPENDED})
"""The states in which the guest is live: `stop` takes it out of them and `cont` back."""


class RunState:
    """The current run state."""

    def __init__(self, initial: str = PRELAUNCH) -> None:
        self.current = initial

    def set(self, new: str) -> None:
        """Changes to `new`; setting the current state again does nothing.

        Raises ValueError for a transition that the table does not have.
        """
        old = self.current
        if new == old:
            return
        if new not in TRANSITIONS.get(old, frozenset()):
            raise ValueError(f"invalid runstate transition: '{old}' -> '{new}'")
        self.current = new

    @property
    def running(self) -> bool:
        return self.current == RUNNING
