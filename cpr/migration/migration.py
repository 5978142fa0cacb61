"""Migration: its commands, which mode each is for, and what query-migrate tells.

`state` has the status, `checks` what refuses, `outgoing` what then happens; `early` is an update
whose guest runs on meanwhile, and `incoming` the other direction.
"""

from __future__ import annotations

from _thread import allocate_lock

from cpr import runstate
from cpr.errors import CommandError, CprError, MigrationError
from cpr.live.program_files import ProgramFiles
from cpr.migration import address as addresses
from cpr.migration import checks
from cpr.migration.asking import Asking
from cpr.migration.incoming import Incoming
from cpr.migration.mode import EXEC, TRANSFER, Mode
from cpr.migration.process import Process
from cpr.migration.program import check_command, own_command
from cpr.migration.state import MigrationState
from cpr.migration.statistics import RamCounters
from cpr.ram_backend import NO_LOCK, claim, give_up
from cpr.report import error_report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.events import EventBus
    from cpr.live.old_image import Update
    from cpr.machine import Machine
    from cpr.mainloop import MainLoop
    from cpr.migration.channel import Handed
    from cpr.migration.cpr_exec import Exec
    from cpr.migration.early import EarlyUpdate
    from cpr.migration.outgoing import Outgoing
    from cpr.migration.rehearsal import Rehearsed
    from cpr.migration.statistics import UpdateTimes
    from cpr.state.fds import PreservedFds

CANCELLABLE = frozenset({"setup", "active", "pre-switchover", "device"})
CLOSE_TIMEOUT = 2.0  # s, for a thread that waits for whoever reads its stream


class Migration:
    """The migrations of one VM.

    `process` is what an exec replaces.  `handed` are the descriptors that monitors were handed by
    getfd and add-fd.  `outgoing` is the last migration away from here, also when it has ended.
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
        self.state = MigrationState(loop, events)
        self.parameters = self.state.parameters
        machine.advances_clock = lambda: self.parameters.get("x-cpr-guest-clock") == "advance"
        self.capabilities = self.state.capabilities
        self.process = Process(machine)
        self.files = ProgramFiles()
        self.update_times: UpdateTimes | None = None
        """What the update that this image comes from has cost, if it tells."""
        self.handed = handed
        self.incoming_side = Incoming(machine, fds, loop, handed, self.state)
        self.outgoing: Outgoing | None = None
        self._thread_done = allocate_lock()
        self._asking = Asking(machine)

    @property
    def status(self) -> str:
        return self.state.status

    @property
    def error(self) -> str | None:
        return self.state.error

    @property
    def _early(self) -> EarlyUpdate | None:
        return self.outgoing.early if self.outgoing is not None else None

    def add_finish_callback(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once on the main loop, when the running migration has ended."""
        self.state.add_finish_callback(callback)

    # The mode of a migration.

    def blockers(self) -> list[str]:
        """Why the VM cannot be migrated in the present mode."""
        return self._create_mode(None).blockers(self.machine)

    def _create_mode(self, cpr_address: dict | None) -> Mode:
        name = str(self.parameters.get("mode"))
        if name == EXEC:
            return self._create_exec(self.parameters.get("cpr-exec-command"))
        if name == TRANSFER:
            from cpr.migration.cpr_transfer import Transfer

            return Transfer(self.fds, self.loop, cpr_address or {}, self._stages)
        return Mode(name, self._stages)

    def _create_exec(self, command: list[str], directory: str | None = None) -> Exec:
        from cpr.migration.cpr_exec import Exec

        return Exec(
            self.fds,
            command,
            self.process,
            self.parameters,
            self.files,
            self._park,
            self._give_back,
            self._asking.serve,
            directory,
        )

    @property
    def _stages(self) -> bool:
        return bool(self.parameters.get("x-cpr-ram-staging"))

    def _park(self) -> None:
        """Ends all threads of this process but the caller's, the main loop's."""
        if self.outgoing is not None:
            self.outgoing.park(CLOSE_TIMEOUT)
        self.process.park()

    def _give_back(self, mode: Exec, update: Update, reason: str) -> Callable[[], None]:
        """A new image has refused, and still has the PID: the old command has it next."""
        from cpr.migration.early import EarlyUpdate

        outgoing = self.outgoing
        assert outgoing is not None
        early = EarlyUpdate(outgoing, mode, self.process, self.files, update)

        def give_back() -> None:
            outgoing.early = early
            early.give_back(reason)

        return give_back

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
        with self._asking:
            self._start(address, mode, "on")

    def start_cpr_exec(self, command: list[str] | None = None) -> None:
        """Sets mode and cpr-exec-command and migrates, in one step.

        Without `command` it is this VMM's own command line, reading its state from a file in a
        private temporary directory.  Raises MigrationError as `migrate` does; the parameters are
        then what they were.
        """
        from cpr.migration.cpr_exec import plan

        saved = {name: self.parameters.get(name) for name in ("mode", "cpr-exec-command")}
        words, uri, directory = plan(command)
        mode = self._create_exec(words, directory)
        self.parameters.set({"mode": EXEC, "cpr-exec-command": words})
        try:
            address = addresses.parse_uri(uri)
            self._check(address, mode)
            with self._asking:
                self._start(address, mode, "on", "auto")
        except CprError:
            self.parameters.set(saved)
            mode.rollback()
            raise

    def _check(self, address: dict, mode: Mode, resume: bool = False) -> None:
        running = self.state.running or self._early is not None
        checks.check(self.machine, self.capabilities, address, mode, running, self.handed, resume)
        if mode.ends_process and self.process.has_untold_guard():
            raise MigrationError(
                "the VMM before this one has not ended yet, and would go on: try again in 2 s"
            )

    def _start(self, address: dict, mode: Mode, *early: str) -> None:
        """Begins a migration; `early` are the settings with which an update is early."""
        exec_mode = mode.early_exec(*early)
        mode.ask()
        self._check(address, mode)  # others had their turn meanwhile
        outgoing = self._begin(mode)
        if exec_mode is not None:
            self._start_early(outgoing, exec_mode)
        else:
            outgoing.start(address)

    def _begin(self, mode: Mode) -> Outgoing:
        from cpr.migration.outgoing import Outgoing

        if self.outgoing is not None:
            self.outgoing.unstage()
        self.outgoing = Outgoing(
            self.machine, self.fds, self.loop, self.handed, self.state, mode, self._thread_done
        )
        if mode.ends_process:
            self.process.on_update()
            self.add_finish_callback(lambda: self.process.on_update_failed(self.error or ""))
        return self.outgoing

    def _start_early(self, outgoing: Outgoing, mode: Exec) -> None:
        """Executes the command after this round of the loop, with the answer gone out."""
        from cpr.migration import savevm
        from cpr.migration.early import EarlyUpdate

        try:
            savevm.prepare()
            mode.remove_directory()
            outgoing.early = early = EarlyUpdate(outgoing, mode, self.process, self.files)
        except Exception as error:
            raise outgoing.fail_by(error) from None

        def execute() -> None:
            if outgoing.early is early and not self.machine.ends:  # and not cancelled meanwhile
                early.execute()

        self.loop.call_soon(execute)

    def check_cpr_exec(self, command: list[str] | None = None) -> Rehearsed:
        """What would refuse `start_cpr_exec(command)` now, found by a rehearsal of it.

        A program that cannot be rehearsed is not started, see `Exec.is_early`: RAM that is staged
        is not there yet.
        """
        from cpr.migration.outgoing import stage
        from cpr.migration.rehearsal import Rehearsed, rehearse

        words = command or own_command()
        mode = self._create_exec(words)
        try:
            self._check({"transport": "file"}, mode)
            staging = stage(self.machine, self.fds, self.state, mode, RamCounters())
            if staging is not None:
                staging.close()
        except MigrationError as error:
            reasons = [str(error)]
        else:
            reasons = []
        reasons += [reason for reason in mode.blockers(self.machine) if reason not in reasons]
        reasons += check_command(command)
        try:
            with self._asking:
                if reasons:
                    return Rehearsed(reasons, None)
                mode.ask()
                self._check({"transport": "file"}, mode)
                if not mode.is_early():
                    return Rehearsed([], None)
        except MigrationError as error:
            return Rehearsed([str(error)], None)
        with self._asking:
            return rehearse(self.machine, self.fds, self._asking.serve, words, mode.timeout_ms)

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
        self._asking.cancel()
        if self._early is not None:
            self.state.set("cancelling")
            self._early.cancel()
        elif self.outgoing is not None and self.status in CANCELLABLE:
            self.outgoing.cancel()

    def continue_(self, state: str) -> None:
        """migrate-continue: goes on from pre-switchover.  Raises MigrationError elsewhere."""
        if self.status != state:
            raise MigrationError(f"Migration not in expected state: {self.status}")
        if self._early is not None and state == "pre-switchover":
            self._early.continue_()
        if self.outgoing is not None:
            self.outgoing.let_go()

    def check_cont(self) -> None:
        """Raises CprError where another process has the guest."""
        if self.machine.runstate.current == runstate.POSTMIGRATE:
            from cpr.migration import holder

            machine = self.machine
            try:
                holder.take_guest(machine.blocks)
                if not holder.take_again(machine.blocks):
                    raise CommandError(NO_LOCK)
                claim(machine.blocks)
            except CprError as error:
                self._leave_again()
                drive = next((drive.file for drive in machine.config.drives), "")
                error_report(f"{error}\nIs another process using the image [{drive}]?")
                raise
            if self.outgoing is not None:
                self.outgoing.unstage()  # the guest goes on in its own RAM
            if (refusal := machine.cpr_rollback()) is not None:
                self._leave_again()
                raise CommandError(str(refusal))
            machine.has_left = False

    def _leave_again(self) -> None:
        """The inverse of what `check_cont` takes; a guest that has never left keeps its locks."""
        from cpr.migration import holder

        if self.machine.has_left:
            give_up(self.machine.blocks)
            holder.let_go(self.machine.blocks)
            holder.give_guest_away(self.machine.blocks)

    def close(self, exit_status: int) -> None:
        """The VM ends, with whatever is under way."""
        self.incoming_side.close(CLOSE_TIMEOUT)
        if self.outgoing is not None:
            self.outgoing.close(exit_status)
        # It reads the machine, which is freed next.
        if self._thread_done.acquire(timeout=CLOSE_TIMEOUT) and self.outgoing is not None:
            self.outgoing.give_up()

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
        if self.outgoing is not None:
            return result | self.outgoing.query()
        times = self.update_times.query() if self.update_times is not None else {}
        return result | self.incoming_side.query() | times
