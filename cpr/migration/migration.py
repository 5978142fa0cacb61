"""Migration: the state machine of `migrate`, its checks, and what query-migrate tells.

    none → setup → active → [pre-switchover →] device → completed
    failing → failed and cancelling → cancelled leave it from any state in between

RAM is written to the stream while the guest is stopped, in mode normal too; RAM that is staged for
another image is copied while it runs.  A thread does both; commands and events meet it through the
main loop.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread

from cpr import runstate
from cpr.config.option_values import parse_bool
from cpr.errors import CommandError, ConfigError, CprError, MigrationError
from cpr.migration import address as addresses
from cpr.migration import channel, cpr_exec, savevm
from cpr.migration.capabilities import Capabilities
from cpr.migration.incoming import Incoming
from cpr.migration.mode import EXEC, NORMAL, TRANSFER, Mode
from cpr.migration.parameters import Parameters
from cpr.migration.program import ProgramFiles, check_command, knows_protocol, own_command
from cpr.migration.statistics import STOPPED_SYNCS, RamCounters, Times, UpdateTimes
from cpr.phases import mark
from cpr.report import error_report, exception_report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.events import EventBus
    from cpr.live.transaction import Update
    from cpr.machine import Machine
    from cpr.mainloop import MainLoop
    from cpr.migration.channel import Channel, Handed
    from cpr.migration.early import EarlyUpdate
    from cpr.migration.rehearsal import Rehearsed
    from cpr.migration.staging import Staging
    from cpr.state.fds import PreservedFds

CLOSE_TIMEOUT = 2.0  # s, for a thread that waits for whoever reads its stream
ENDED = frozenset({"none", "completed", "failed", "cancelled"})


class Cancelled(MigrationError):
    """migrate_cancel came in time."""


class Migration:
    """The outgoing migration of one VM, and its parameters.

    `before_exec()` is called on the main loop just before an exec, to flush what must not be
    lost, `park()` and `unpark()` around it, to end all threads but the caller's and to start them
    again, and `on_new_pid()` where this VMM goes on in another process.  `exec_fds()` are the
    sockets that QEMU's exec closes, and `reopen()` makes them again where it has failed after that.
    `interrupted()`: a signal has come that ends the VM when the main loop sees it.
    `handed` are the descriptors that monitors were handed by getfd and add-fd.
    """

    def __init__(
        self,
        machine: Machine,
        fds: PreservedFds,
        loop: MainLoop,
        events: EventBus,
        handed: Handed,
    ) -> None:
        self.machine = machine
        self.fds = fds
        self.loop = loop
        self.events = events
        self.parameters = Parameters()
        machine.advances_clock = lambda: self.parameters.get("x-cpr-guest-clock") == "advance"
        self.capabilities = Capabilities(self.parameters, lambda: self.running)
        self.status = "none"
        self.error: str | None = None
        self.before_exec: Callable[[], None] = lambda: None
        self.park: Callable[[], None] = machine.park
        self.unpark: Callable[[], None] = machine.unpark
        self.on_new_pid: Callable[[], None] = lambda: None
        self.exec_fds: Callable[[], list[int]] = list
        self.reopen: Callable[[], None] = lambda: None
        self.interrupted: Callable[[], bool] = lambda: False
        self.files = ProgramFiles()
        self.early: EarlyUpdate | None = None
        self.update_times: UpdateTimes | None = None
        """What the update that this image comes from has cost, if it tells."""
        self.handed = handed
        self.incoming_side = Incoming(self)
        self._finish_callbacks: list[Callable[[], None]] = []
        self.old_state = runstate.RUNNING
        self._switchover = allocate_lock()
        self._outgoing = False  # whether the status is of a migration that began here
        self._cancel = False
        self._waits_for_target = False
        self._channel: Channel | None = None
        self._mode: Mode | None = None
        self._saver: savevm.Saver | None = None
        self._staging: Staging | None = None
        self._thread_done = allocate_lock()
        self._times = Times()
        self.ram = RamCounters()

    @property
    def running(self) -> bool:
        return self.status not in ENDED

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
        return self._create_mode(None).blockers(self.machine)

    def _create_mode(self, cpr_address: dict | None) -> Mode:
        name = str(self.parameters.get("mode"))
        mode = Mode(name)
        if name == EXEC:
            mode = self._as_asked(cpr_exec.Exec(self.fds, self.parameters.get("cpr-exec-command")))
        elif name == TRANSFER:
            from cpr.migration.cpr_transfer import Transfer

            mode = Transfer(self.fds, self.loop, cpr_address or {})
        mode.stages = self._stages
        return mode

    @property
    def _stages(self) -> bool:
        return bool(self.parameters.get("x-cpr-ram-staging"))

    def _as_asked(self, mode: cpr_exec.Exec) -> cpr_exec.Exec:
        """Gives the mode the parameters that are about how it does its exec."""
        mode.before_exec = self.before_exec
        mode.park, mode.unpark = self._park, self.unpark
        mode.on_new_pid = self.on_new_pid
        mode.exec_fds, mode.reopen = self.exec_fds, self.reopen
        mode.interrupted = self.interrupted
        mode.timeout_ms = int(self.parameters.get("x-cpr-exec-timeout"))
        mode.give_back = self._give_back
        mode.stages = self._stages
        return mode

    def _give_back(self, update: Update, reason: str) -> None:
        """A new image has refused, and still has the PID: the old command has it next."""
        from cpr.migration.early import EarlyUpdate

        assert isinstance(self._mode, cpr_exec.Exec)
        early = EarlyUpdate(self, self._mode, self._mode.timeout_ms, update)

        def give_back() -> None:
            self.early = early
            early.give_back(reason)

        self.loop.call_soon(give_back)

    def _park(self) -> None:
        """Ends all threads of this process but the caller's, the main loop's."""
        if self._thread_done.acquire(timeout=CLOSE_TIMEOUT):
            self._thread_done.release()
        if self._staging is not None:
            self._staging.park()
        self.park()

    def _check(self, address: dict, mode: Mode, resume: bool = False) -> None:
        """What refuses a migration, in QEMU's order; the guest is not touched."""
        background = addresses.connects_in_background(address)
        if self.capabilities.enabled("multifd") and not background:
            raise MigrationError("Migration requires multi-channel URIs (e.g. tcp)")
        if self.capabilities.enabled("mapped-ram") and address["transport"] != "file":
            raise MigrationError("Migration requires seekable transport (e.g. file)")
        if mode.name == TRANSFER and not background:
            raise MigrationError("Migration requires streamable transport (eg unix)")
        if resume:
            raise MigrationError("Cannot resume if there is no paused migration")
        if self.running or self.early is not None:
            raise MigrationError("There's a migration process in progress")
        if self.machine.runstate.current == runstate.INMIGRATE:
            raise MigrationError("Guest is waiting for an incoming migration")
        if self.machine.runstate.current == runstate.POSTMIGRATE:
            raise MigrationError("Can't migrate the vm that was paused due to previous migration")
        if isinstance(mode, cpr_exec.Exec) and not mode.command:
            raise MigrationError("cpr-exec mode requires setting cpr-exec-command")
        for reason in mode.blockers(self.machine):
            raise MigrationError(reason)
        self._check_capabilities(mode)

    def _check_capabilities(self, mode: Mode) -> None:
        if mode.name == NORMAL:
            return
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
        address = addresses.parse(uri, channels)
        cpr_address = addresses.cpr_address(channels)
        mode = self._create_mode(cpr_address)
        self._check(address, mode, resume)
        if mode.name == TRANSFER and cpr_address is None:
            raise MigrationError("missing 'cpr' migration channel")
        if isinstance(mode, cpr_exec.Exec) and self._is_early(mode, "on"):
            self._start_early(mode)
            return
        self._start(address, mode)

    def start_cpr_exec(self, command: list[str] | None = None) -> None:
        """Sets mode and cpr-exec-command and migrates, in one step.

        Without `command` it is this VMM's own command line, reading its state from a file in a
        private temporary directory.  Raises MigrationError as `migrate` does; the parameters are
        then what they were.
        """
        saved = {name: self.parameters.get(name) for name in ("mode", "cpr-exec-command")}
        mode = self._as_asked(cpr_exec.plan(self.fds, command))
        self.parameters.set({"mode": EXEC, "cpr-exec-command": mode.command})
        try:
            address = addresses.parse_uri(mode.uri)
            self._check(address, mode)
            if self._is_early(mode, "on", "auto"):
                self._start_early(mode)
            else:
                self._start(address, mode)
        except CprError:
            self.parameters.set(saved)
            mode.walk_back()
            raise

    def _is_early(self, mode: Mode, *settings: str) -> bool:
        """Whether the guest runs on while the new program starts.

        Not with RAM that is staged, nor with a program that knows no hand-over: they stop it.
        """
        if not isinstance(mode, cpr_exec.Exec) or mode.stages:
            return False
        if self.parameters.get("x-cpr-ram-pagesize"):
            return False
        if self.parameters.get("x-cpr-exec-overlap") not in settings:
            return False
        return knows_protocol(mode.command, self.files)

    def _start_early(self, mode: cpr_exec.Exec) -> None:
        """Executes the command after this round of the loop, with the answer gone out."""
        from cpr.migration.early import EarlyUpdate

        savevm.prepare()
        self._begin(mode)
        self._unstage()
        mode.remove_directory()
        try:
            self.early = early = EarlyUpdate(self, mode, mode.timeout_ms)
        except CprError as error:
            self._fail(error)
            raise

        def execute() -> None:
            if self.early is early:  # and not cancelled meanwhile
                early.execute()

        self.loop.call_soon(execute)

    def check_cpr_exec(self, command: list[str] | None = None) -> Rehearsed:
        """What would refuse `start_cpr_exec(command)` now, found by a rehearsal of it.

        A program that cannot be rehearsed is not started; see `can_rehearse`.
        """
        from cpr.migration.rehearsal import Rehearsed, rehearse

        words = command or own_command()
        mode = self._as_asked(cpr_exec.Exec(self.fds, command or [""]))
        try:
            self._check({"transport": "file"}, mode)
            self._stage(mode, RamCounters())
            self._unstage()
        except MigrationError as error:
            reasons = [str(error)]
        else:
            reasons = []
        reasons += [reason for reason in mode.blockers(self.machine) if reason not in reasons]
        reasons += check_command(command)
        if reasons or not self.can_rehearse(command):
            return Rehearsed(reasons, None)
        return rehearse(self, words, mode.timeout_ms)

    def can_rehearse(self, command: list[str] | None) -> bool:
        """Whether the program of `command` knows how; RAM that is staged is not there yet."""
        return not self._stages and knows_protocol(command or own_command(), self.files)

    def incoming(
        self,
        uri: str | None = None,
        channels: list[dict] | None = None,
        exit_on_error: bool = True,
    ) -> None:
        """migrate-incoming, for a VMM that was started with -incoming defer."""
        self.incoming_side.check()
        self.incoming_side.start(addresses.parse(uri, channels), exit_on_error)

    def cancel(self) -> None:
        """migrate_cancel: nothing happens where no migration runs."""
        if self.early is not None:
            self.set_status("cancelling")
            self.early.cancel()
        elif self.status in ("setup", "active", "pre-switchover"):
            self._cancel = True
            self.set_status("cancelling")
            self._let_go()
            channel = self._channel
            if channel is not None:
                channel.shutdown()
            if self._staging is not None:
                self._staging.cancel()
            if self._waits_for_target:
                self._waits_for_target = False
                self.end("cancelled", None)

    def continue_(self, state: str) -> None:
        """migrate-continue: goes on from pre-switchover.  Raises MigrationError elsewhere."""
        if self.status != state:
            raise MigrationError(f"Migration not in expected state: {self.status}")
        if self.early is not None:
            self.early.continue_()
        self._let_go()

    def check_cont(self) -> None:
        """Raises CprError while a migration holds the VM stopped, or another process has it."""
        state = self.machine.runstate.current
        if self.running and state == runstate.FINISH_MIGRATE:
            raise MigrationError("Migration is not finalized yet")
        if state == runstate.POSTMIGRATE:
            from cpr.migration.cpr_transfer import take_guest

            try:
                take_guest(self.machine)
            except CprError as error:
                drive = next((drive.file for drive in self.machine.config.drives), "")
                error_report(f"{error}\nIs another process using the image [{drive}]?")
                raise
            self._unstage()  # the guest goes on in its own RAM
            self.machine.cpr_walk_back()

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

    def _begin(self, mode: Mode) -> None:
        self.error = None
        self.ram = RamCounters()
        self._outgoing = True
        self._cancel = False
        self._mode = mode
        self._times = Times()
        self.set_status("setup")

    def _start(self, address: dict, mode: Mode) -> None:
        self._begin(mode)
        if isinstance(mode, cpr_exec.Exec):
            mode.knows_protocol = knows_protocol(mode.command, self.files)
        try:
            savevm.prepare()
            self._unstage()
            self._stage(mode, self.ram)
            waits = mode.begin(lambda: self._go_on(address))
            if not waits and not addresses.connects_in_background(address):
                self._open(address)
        except CprError as error:
            self._fail(error)
            raise
        self._waits_for_target = waits
        if not waits:
            self._run_soon(None if self._channel is not None else address)

    def _stage(self, mode: Mode, counters: RamCounters) -> None:
        """Makes room for copies of the RAM that the new image could not map as it is, if any.

        Raises MigrationError; then there are none.
        """
        page_size = self.parameters.get("x-cpr-ram-pagesize")
        if mode.name not in (EXEC, TRANSFER) or not (mode.stages or page_size):
            return
        from cpr.migration import staging

        blocks = staging.wanted(self.machine, mode.regenerates, page_size)
        if not blocks:
            return
        if not mode.stages:
            raise MigrationError("x-cpr-ram-pagesize needs x-cpr-ram-staging=on")
        for device in self.machine.devices:
            if reason := device.copy_blocker():
                raise MigrationError(reason)
        self._staging = staging.Staging(
            self.machine, self.fds, self.parameters, blocks, counters, self._emit_pass
        )

    def _unstage(self) -> None:
        """The inverse of `_stage`."""
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _emit_pass(self, number: int) -> None:
        if self.capabilities.enabled("events"):
            self.events.emit("MIGRATION_PASS", {"pass": number})

    def _go_on(self, address: dict) -> None:
        """The target of a cpr-transfer is ready."""
        self._waits_for_target = False
        self._run_soon(address)

    def _run_soon(self, address: dict | None) -> None:
        """Starts the thread after this round of the loop: `migrate` is answered before `active`."""

        def start() -> None:
            self._thread_done.acquire()
            start_new_thread(self._run_thread, (address,))

        self.loop.call_soon(start)

    def _open(self, address: dict) -> None:
        """Opens the channel and, where the mode wants that first, stops the guest."""
        assert self._mode is not None
        self._channel = channel.open_outgoing(address, self.handed)
        self._times.set_up()
        if self._mode.stops_first and self._staging is None:
            self.stop_guest()

    def stop_guest(self) -> None:
        """Stops the guest for the rest of the migration; `run_on` is the inverse."""
        self._times.stop()
        self.old_state = self.machine.runstate.current
        mark("stop")
        if isinstance(self._mode, cpr_exec.Exec):
            self._mode.stopped_ns = self._times.stopped_ns
        self.machine.stop(runstate.FINISH_MIGRATE)
        mark("save")

    def _copy_ram(self, staging: Staging, mode: Mode, address: dict | None) -> None:
        """The RAM that is staged: while the guest runs, and what is left when it has stopped."""
        self._times.set_up()
        staging.live()
        self._check_cancel()
        if address is not None:  # not before: who is connected to does nothing but read
            self._open(address)
        self.stop_guest()
        staging.finish()
        self._check_cancel()

    def _run_thread(self, address: dict | None) -> None:
        try:
            self._run(address)
        finally:
            self._thread_done.release()

    def close(self, exit_status: int) -> None:
        """Ends what is under way: a new image ends too, and a copy of RAM is rolled back."""
        self.incoming_side.close()
        if self.early is not None:
            self.early.end_vm(exit_status)
            self.early = None
        self._cancel = True
        if self._staging is not None:
            self._staging.cancel()
        self._let_go()
        channel = self._channel
        if channel is not None:
            channel.shutdown()
        # It reads the machine, which is freed next.
        self._thread_done.acquire(timeout=CLOSE_TIMEOUT)

    def _run(self, address: dict | None) -> None:
        """The migration thread; `address` is what is still to be connected to."""
        assert self._mode is not None
        try:
            self._check_cancel()
            if address is not None and self._staging is None:
                self._open(address)
            self._check_cancel()
            self.set_status("active")
            if self._staging is not None:
                self._copy_ram(self._staging, self._mode, address)
            elif not self._mode.stops_first:
                self.stop_guest()
            assert self._channel is not None
            self.machine.cpr_prepare(self._mode.name)
            self._saver = savevm.Saver(
                self.machine, self.capabilities, self.old_state, self._mode, self._channel
            )
            self._write(self._saver.ram)
            if self._staging is None:
                self.ram = self._saver.counters
                self._emit_pass(STOPPED_SYNCS)
            if self.capabilities.enabled("pause-before-switchover"):
                self._wait_for_switchover()
            self.set_status("device")
            self._write_all()
            self._times.end()
            self.loop.call_soon(self._complete)
        except Cancelled as error:
            error_report(error)
            self.end("cancelled", str(error))
        except CprError as error:
            if self._cancel:
                self.end("cancelled", str(error))
            else:
                self._fail(error)
        except Exception as error:  # the guest must not be lost to a bug here
            exception_report(error)
            self._fail(MigrationError(f"internal error: {error}"))

    def _wait_for_switchover(self) -> None:
        self._switchover.acquire(blocking=False)
        self.set_status("pre-switchover")
        self._check_cancel()
        self._switchover.acquire()
        self._let_go()
        self._check_cancel()

    def _check_cancel(self) -> None:
        if self._cancel:
            raise Cancelled("Switchover is interrupted")

    def _write(self, step: Callable[[], None]) -> None:
        """Runs one step of writing the stream, and puts it out."""
        assert self._channel is not None and self._saver is not None
        try:
            step()
            self._channel.flush()
        except OSError as error:
            if step == self._saver.ram:
                raise MigrationError("ram_save_setup failed: Input/output error") from None
            kind = self._channel.kind
            raise MigrationError(
                f"Failed to write the stream: Unable to write to {kind}: {error.strerror}"
            ) from None
        finally:
            self.ram.written = self._channel.transferred

    def _write_all(self) -> None:
        assert self._channel is not None and self._saver is not None
        self._write(self._saver.devices)
        if self.capabilities.enabled("return-path") and self._channel.kind != "socket":
            raise MigrationError("Unable to read from file: Bad file descriptor")
        self._write(self._channel.finish)

    def _complete(self) -> None:
        """Ends a migration whose stream is written, on the main loop.

        Comes back from an exec only where that failed, and the guest runs on.
        """
        assert self._mode is not None
        self._channel = None
        if self.machine.ended:  # the guest has shut itself down meanwhile
            return
        try:
            if self._mode.ends_process:
                self.set_status("completed")
            self._mode.finish(self.machine)
        except Exception as error:  # the guest must not be lost to a bug here
            if not isinstance(error, CprError):
                exception_report(error)
            mode = self._mode
            if not (isinstance(mode, cpr_exec.Exec) and mode.gives_back):
                error_report(error)
            self.end("failed", str(error))
            if isinstance(mode, cpr_exec.Exec) and mode.ended_by:
                self.machine.shutdown(False, "host-signal")
            return
        if self._staging is not None:
            self._staging.hand_over()
        self.set_status("completed")
        self._call_back()

    def _fail(self, error: CprError) -> None:
        self.set_status("failing")
        self.end("failed", str(error))

    def end(self, status: str, error: str | None) -> None:
        """Rollback: the channel, what the mode did, and the vCPUs."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._mode is not None:
            self._mode.walk_back()
            self._mode = None
        self.early = None
        self.machine.cpr_walk_back()
        self._unstage()
        self.error = error
        exec_failed = self.status == "completed"
        if exec_failed:
            self.set_status(status)
        self._go_back(exec_failed)
        if not exec_failed:
            self.set_status(status)
        self._call_back()

    def run_on(self) -> None:
        """The inverse of `stop_guest`, for a hand-over that did not happen."""
        self.machine.cpr_walk_back()
        self._go_back(False)

    def _call_back(self) -> None:
        callbacks, self._finish_callbacks = self._finish_callbacks, []
        for callback in callbacks:
            self.loop.call_soon(callback)

    def _go_back(self, exec_failed: bool) -> None:
        if self.machine.runstate.current != runstate.FINISH_MIGRATE:
            return
        if self.old_state in runstate.LIVE:
            self.machine.cont()
        elif exec_failed:
            self.machine.runstate.set(runstate.POSTMIGRATE)
        else:
            self.machine.runstate.set(self.old_state)

    def set_status(self, status: str) -> None:
        self.status = status
        if self.capabilities.enabled("events"):
            self.events.emit("MIGRATION", {"status": status})

    def set_incoming_status(self, status: str, error: str | None = None) -> None:
        """The same state machine, driven by the incoming side."""
        self.error = error
        self.set_status(status)

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
        if not self._outgoing:
            times = self.update_times.query() if self.update_times is not None else {}
            return result | self.incoming_side.query() | times
        if self.status in ("active", "pre-switchover", "device"):
            downtime = self.ram.expected_downtime
            limit = self.parameters.get("downtime-limit")
            result["expected-downtime"] = limit if downtime is None else downtime
            result["remaining"] = self.ram.remaining
            result |= self._times.query(False) | {"ram": self.ram.query(self._times)}
        elif self.status == "completed":
            result |= self._times.query(True) | {"ram": self.ram.query(self._times)}
        return result
