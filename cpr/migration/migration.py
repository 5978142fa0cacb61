"""Migration: the state machine behind `migrate`, its checks, and what query-migrate tells.

    none → setup → active → [pre-switchover →] device → completed
    failing → failed and cancelling → cancelled leave it from any state in between

The vCPUs are stopped before the state is written, in every mode: RAM is not copied while the
guest runs.  A thread writes the state; commands and events meet it through the main loop.
"""

from __future__ import annotations

import sys
import time
from _thread import allocate_lock, start_new_thread

from cpr import runstate
from cpr.config.option_values import parse_bool
from cpr.errors import CommandError, ConfigError, CprError, MigrationError
from cpr.migration import channel, cpr_exec, savevm
from cpr.migration.incoming import Incoming
from cpr.migration.parameters import Capabilities, Parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.events import EventBus
    from cpr.machine import Machine
    from cpr.mainloop import MainLoop
    from cpr.migration.channel import Channel
    from cpr.state.fds import PreservedFds

MODE_EXEC = "cpr-exec"
ENDED = frozenset({"none", "completed", "failed", "cancelled"})
COUNTERS = (
    "transferred",
    "remaining",
    "total",
    "duplicate",
    "normal",
    "normal-bytes",
    "dirty-pages-rate",
    "mbps",
    "dirty-sync-count",
    "postcopy-requests",
    "page-size",
    "multifd-bytes",
    "pages-per-second",
    "precopy-bytes",
    "downtime-bytes",
    "postcopy-bytes",
    "dirty-sync-missed-zero-copy",
)


class Cancelled(MigrationError):
    """migrate_cancel came in time."""


class Migration:
    """The outgoing migration of one VM, and its parameters.

    `before_exec()` is called on the main loop just before an exec, to flush what must not be
    lost; `find_fd(name)` gives a descriptor that a monitor was handed by getfd, with ownership.
    """

    def __init__(
        self, machine: Machine, fds: PreservedFds, loop: MainLoop, events: EventBus
    ) -> None:
        self.machine = machine
        self.fds = fds
        self.loop = loop
        self.events = events
        self.parameters = Parameters()
        self.capabilities = Capabilities(self.parameters, lambda: self.running)
        self.status = "none"
        self.error: str | None = None
        self.before_exec: Callable[[], None] = lambda: None
        self.find_fd: Callable[[str], int] = _no_fd
        self.incoming_side = Incoming(self)
        self._finish_callbacks: list[Callable[[], None]] = []
        self._old_state = runstate.RUNNING
        self._switchover = allocate_lock()
        self._cancel = False
        self._channel: Channel | None = None
        self._exec: cpr_exec.Exec | None = None
        self._started_ns = 0
        self._stopped_ns = 0
        self._setup_ns = 0
        self._total_ns = 0
        self._transferred = 0

    @property
    def running(self) -> bool:
        return self.status not in ENDED

    @property
    def mode(self) -> str:
        return str(self.parameters.get("mode"))

    def apply_globals(self, settings: Sequence[tuple[str, str, str]]) -> None:
        """-global migration.NAME=VALUE: a parameter, or x-NAME for the capability NAME.

        Raises ConfigError with QEMU's text.
        """
        for driver, name, value in settings:
            if driver != "migration":
                continue
            capability = name.removeprefix("x-")
            try:
                if name in self.parameters.names():
                    self.parameters.set_from_string(name, value)
                elif any(entry["capability"] == capability for entry in self.capabilities.query()):
                    on = parse_bool(value)
                    self.capabilities.set([{"capability": capability, "state": on}])
                else:
                    raise CommandError(f"Property 'migration.{name}' not found")
            except (CommandError, ValueError) as error:
                raise ConfigError(f"can't apply global migration.{name}={value}: {error}") from None

    # Checks.

    def blockers(self) -> list[str]:
        """Why the VM cannot be migrated in the present mode."""
        if not self.mode.startswith("cpr-"):
            return []
        reasons = [block.cpr_blocker() for block in self.machine.blocks]
        reasons += [device.cpr_blocker() for device in self.machine.devices]
        return [reason for reason in reasons if reason]

    def _check(self, address: dict, resume: bool) -> None:
        """What refuses a migration, in QEMU's order; the guest is not touched."""
        if self.capabilities.enabled("multifd") and not channel.connects_in_background(address):
            raise MigrationError("Migration requires multi-channel URIs (e.g. tcp)")
        if resume:
            raise MigrationError("Cannot resume if there is no paused migration")
        if self.running:
            raise MigrationError("There's a migration process in progress")
        if self.machine.runstate.current == runstate.INMIGRATE:
            raise MigrationError("Guest is waiting for an incoming migration")
        if self.machine.runstate.current == runstate.POSTMIGRATE:
            raise MigrationError("Can't migrate the vm that was paused due to previous migration")
        if self.mode != MODE_EXEC:
            raise MigrationError(
                f"migration mode '{self.mode}' is not supported: RAM cannot be sent; "
                "use mode cpr-exec"
            )
        if not self.parameters.get("cpr-exec-command"):
            raise MigrationError("cpr-exec mode requires setting cpr-exec-command")
        for reason in self.blockers():
            raise MigrationError(reason)
        for capability, text in (
            ("postcopy-ram", "Cannot use postcopy with CPR"),
            ("dirty-bitmaps", "Cannot use postcopy with CPR"),
            ("background-snapshot", "Cannot use background snapshot with CPR"),
            ("x-colo", "Cannot use COLO with CPR"),
        ):
            if self.capabilities.enabled(capability):
                raise MigrationError(text)

    # Commands.

    def migrate(
        self, uri: str | None = None, channels: list[dict] | None = None, resume: bool = False
    ) -> None:
        """Starts a migration.  Raises MigrationError where it is refused; the guest runs on."""
        address = channel.parse(uri, channels)
        self._check(address, resume)
        command = [str(word) for word in self.parameters.get("cpr-exec-command")]
        self._start(address, cpr_exec.Exec(self.fds, command))

    def start_cpr_exec(self, command: list[str] | None = None) -> None:
        """Sets mode and cpr-exec-command and migrates, in one step.

        Without `command` it is this VMM's own command line, reading its state from a file in a
        private temporary directory.  Raises MigrationError as `migrate` does; the parameters are
        then what they were.
        """
        saved = {name: self.parameters.get(name) for name in ("mode", "cpr-exec-command")}
        step = cpr_exec.plan(self.fds, command)
        self.parameters.set({"mode": MODE_EXEC, "cpr-exec-command": step.command})
        try:
            address = channel.parse_uri(step.uri)
            self._check(address, False)
            self._start(address, step)
        except CprError:
            self.parameters.set(saved)
            step.clean_up()
            raise

    def check_cpr_exec(self, command: list[str] | None = None) -> list[str]:
        """All that would refuse `start_cpr_exec(command)` now, without doing it."""
        reasons = []
        if self.running:
            reasons.append("There's a migration process in progress")
        if self.machine.runstate.current == runstate.INMIGRATE:
            reasons.append("Guest is waiting for an incoming migration")
        if self.machine.runstate.current == runstate.POSTMIGRATE:
            reasons.append("Can't migrate the vm that was paused due to previous migration")
        for block in self.machine.blocks:
            if reason := block.cpr_blocker():
                reasons.append(reason)
        for device in self.machine.devices:
            if reason := device.cpr_blocker():
                reasons.append(reason)
        return reasons + cpr_exec.check_command(command)

    def incoming(
        self,
        uri: str | None = None,
        channels: list[dict] | None = None,
        exit_on_error: bool = True,
    ) -> None:
        """migrate-incoming, for a VMM that was started with -incoming defer."""
        self.incoming_side.start(channel.parse(uri, channels), exit_on_error)

    def cancel(self) -> None:
        """migrate_cancel: nothing happens where no migration runs."""
        if self.status in ("setup", "active", "pre-switchover"):
            self._cancel = True
            self._set_status("cancelling")
            self._let_go()

    def continue_(self, state: str) -> None:
        """migrate-continue: goes on from pre-switchover.  Raises MigrationError elsewhere."""
        if self.status != state:
            raise MigrationError(f"Migration not in expected state: {self.status}")
        self._let_go()

    def check_cont(self) -> None:
        """Raises MigrationError while a migration holds the VM stopped."""
        if self.running and self.machine.runstate.current == runstate.FINISH_MIGRATE:
            raise MigrationError("Migration is not finalized yet")

    def _let_go(self) -> None:
        if self._switchover.locked():
            self._switchover.release()

    def add_finish_callback(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once on the main loop, when the running migration has ended."""
        if self.running:
            self._finish_callbacks.append(callback)
        else:
            self.loop.call_soon(callback)

    # The migration itself.

    def _start(self, address: dict, step: cpr_exec.Exec) -> None:
        self.error = None
        self._cancel = False
        self._exec = step
        self._started_ns = time.monotonic_ns()
        self._set_status("setup")
        if channel.connects_in_background(address):
            self._run_soon(address)
            return
        try:
            self._set_up(address)
        except CprError as error:
            self._fail(error)
            raise
        self._run_soon(None)

    def _run_soon(self, address: dict | None) -> None:
        """Starts the thread after this round of the loop: `migrate` is answered before `active`."""

        def start() -> None:
            start_new_thread(self._run, (address,))

        self.loop.call_soon(start)

    def _set_up(self, address: dict) -> None:
        """Writes the CPR state, opens the channel and stops the guest; on failure none of it."""
        assert self._exec is not None
        savevm.prepare()
        if self.parameters.get("x-cpr-mm-holder"):
            self._exec.hold()
        self._exec.persist()
        self._channel = channel.open_outgoing(address, self.find_fd)
        self._old_state = self.machine.runstate.current
        self._setup_ns = time.monotonic_ns() - self._started_ns
        self._stopped_ns = time.monotonic_ns()
        self.machine.stop(runstate.FINISH_MIGRATE)

    def _run(self, address: dict | None) -> None:
        """The migration thread."""
        try:
            if address is not None:
                self._set_up(address)
            self._check_cancel()
            self._set_status("active")
            if self.capabilities.enabled("events"):
                self.events.emit("MIGRATION_PASS", {"pass": 2})
            if self.capabilities.enabled("pause-before-switchover"):
                self._wait_for_switchover()
            self._set_status("device")
            self._write()
            self._total_ns = time.monotonic_ns() - self._started_ns
            self._set_status("completed")
            self.loop.call_soon(self._exec_now)
        except Cancelled as error:
            self._end("cancelled", str(error))
        except CprError as error:
            self._fail(error)
        except Exception as error:  # the guest must not be lost to a bug here
            sys.excepthook(type(error), error, error.__traceback__)
            self._fail(MigrationError(f"internal error: {error}"))

    def _wait_for_switchover(self) -> None:
        self._switchover.acquire(blocking=False)
        self._set_status("pre-switchover")
        self._check_cancel()
        self._switchover.acquire()
        self._let_go()
        self._check_cancel()

    def _check_cancel(self) -> None:
        if self._cancel:
            raise Cancelled("Switchover is interrupted")

    def _write(self) -> None:
        assert self._channel is not None
        try:
            savevm.save(self.machine, self.capabilities, self._old_state, self._channel.write)
            self._channel.finish()
        except OSError as error:
            raise MigrationError(f"Unable to write to the channel: {error.strerror}") from None
        finally:
            self._transferred = self._channel.transferred

    def _exec_now(self) -> None:
        """Becomes the new VMM; comes back only where that failed, and the guest runs on."""
        assert self._exec is not None
        self.before_exec()
        try:
            self._exec.execute()
        except MigrationError as error:
            print(f"cpr-vmm: {error}", file=sys.stderr)
            self._end("failed", str(error))

    def _fail(self, error: CprError) -> None:
        self._set_status("failing")
        self._end("failed", str(error))

    def _end(self, status: str, error: str) -> None:
        """Walks everything back: channel, CPR state, temporary files, and the vCPUs."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._exec is not None:
            self._exec.unpersist()
            self._exec.unhold()
            self._exec.clean_up()
            self._exec = None
        self.error = error
        exec_failed = self.status == "completed"
        if exec_failed:
            self._set_status(status)
        self._go_back(exec_failed)
        if not exec_failed:
            self._set_status(status)
        callbacks, self._finish_callbacks = self._finish_callbacks, []
        for callback in callbacks:
            self.loop.call_soon(callback)

    def _go_back(self, exec_failed: bool) -> None:
        if self.machine.runstate.current != runstate.FINISH_MIGRATE:
            return
        if self._old_state in runstate.LIVE:
            self.machine.cont()
        elif exec_failed:
            self.machine.runstate.set(runstate.POSTMIGRATE)
        else:
            self.machine.runstate.set(self._old_state)

    def _set_status(self, status: str) -> None:
        self.status = status
        if self.capabilities.enabled("events"):
            self.events.emit("MIGRATION", {"status": status})

    def set_incoming_status(self, status: str, error: str | None = None) -> None:
        """The same state machine, driven by the incoming side."""
        self.error = error
        self._set_status(status)

    # Answers.

    def query(self) -> dict:
        """query-migrate; {} before the first migration."""
        result: dict = {}
        if reasons := self.blockers():
            result["blocked-reasons"] = reasons
        if self.status == "none":
            return result
        result["status"] = self.status
        if self.error is not None and self.status in ("failed", "cancelled"):
            result["error-desc"] = self.error
        if self.incoming_side.started:
            return result
        if self.status in ("active", "pre-switchover", "device", "completed"):
            result |= self._statistics()
        return result

    def _statistics(self) -> dict:
        total_ns = self._total_ns or time.monotonic_ns() - self._started_ns
        ram = dict.fromkeys(COUNTERS, 0)
        ram["total"] = sum(block.size for block in self.machine.blocks)
        ram["page-size"] = 4096
        ram["dirty-sync-count"] = 1
        ram["transferred"] = ram["precopy-bytes"] = self._transferred
        result: dict = {
            "total-time": total_ns // 1_000_000,
            "setup-time": self._setup_ns // 1_000_000,
            "ram": ram,
        }
        if self.status == "completed":
            result["downtime"] = (time.monotonic_ns() - self._stopped_ns) // 1_000_000
        else:
            result["expected-downtime"] = self.parameters.get("downtime-limit")
        return result


def _no_fd(name: str) -> int:
    raise MigrationError(f"File descriptor named '{name}' has not been found")
