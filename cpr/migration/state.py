"""What query-migrate tells and the user sets, of one VM: the status, parameters and capabilities.

    none → setup → active → [pre-switchover →] device → completed
    failing → failed and cancelling → cancelled leave it from any state in between

Both directions go through it, as a VM has one migration at a time.
"""

from __future__ import annotations

from cpr.config.option_values import parse_bool
from cpr.errors import CommandError, ConfigError
from cpr.migration import deprecated
from cpr.migration.capabilities import Capabilities
from cpr.migration.parameters import Parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.events import EventBus
    from cpr.mainloop import MainLoop

ENDED = frozenset({"none", "completed", "failed", "cancelled"})


class MigrationState:
    """The one state of a VM's migration; `error` is the last one's, if it has failed."""

    def __init__(self, loop: MainLoop, events: EventBus) -> None:
        self._loop = loop
        self._events = events
        self.parameters = Parameters()
        self.capabilities = Capabilities(self.parameters, lambda: self.running)
        self.status = "none"
        self.error: str | None = None
        self._finish_callbacks: list[Callable[[], None]] = []

    @property
    def running(self) -> bool:
        return self.status not in ENDED

    def set(self, status: str) -> None:
        """Goes to `status`, with an event where capability `events` is on."""
        self.status = status
        if self.capabilities.enabled("events"):
            self._events.emit("MIGRATION", {"status": status})

    def emit_pass(self, number: int) -> None:
        if self.capabilities.enabled("events"):
            self._events.emit("MIGRATION_PASS", {"pass": number})

    def apply_globals(self, settings: Sequence[tuple[str, str, str]]) -> None:
        """-global migration.NAME=VALUE: a parameter, or x-NAME for the capability NAME.

        Raises ConfigError with QEMU's text.
        """
        for driver, name, value in settings:
            if driver != "migration":
                continue
            capability = name.removeprefix("x-")
            try:
                if name in self.parameters.names() or name in deprecated.PARAMETERS:
                    self.parameters.set_from_string(name, value)
                elif any(entry["capability"] == capability for entry in self.capabilities.query()):
                    on = parse_bool(value)
                    self.capabilities.set([{"capability": capability, "state": on}])
                else:
                    raise CommandError(f"Property 'migration.{name}' not found")
            except (CommandError, ValueError) as error:
                raise ConfigError(f"can't apply global migration.{name}={value}: {error}") from None

    def add_finish_callback(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once on the main loop, when the running migration has ended."""
        if self.running:
            self._finish_callbacks.append(callback)
        else:
            self._loop.call_soon(callback)

    def take_callbacks(self) -> list[Callable[[], None]]:
        """Who waits for the migration that is about to end, for `call_back`: when the last status
        is set the next one may begin, on another thread."""
        callbacks, self._finish_callbacks = self._finish_callbacks, []
        return callbacks

    def call_back(self, callbacks: list[Callable[[], None]]) -> None:
        for callback in callbacks:
            self._loop.call_soon(callback)
