"""One migration away from here: what happens between `setup` and its end.

RAM is written to the stream while the guest is stopped, in mode normal too; RAM that is staged for
another image is copied while it runs.  A thread does both; commands and events meet it through the
main loop.
"""

from __future__ import annotations

from _thread import LockType, allocate_lock, start_new_thread

from cpr import runstate
from cpr.errors import CprError, MigrationError
from cpr.faults import point
from cpr.migration import address as addresses
from cpr.migration import channel, savevm
from cpr.migration.cancellation import INTERRUPTED, Cancellation
from cpr.migration.incoming import NO_THREAD
from cpr.migration.mode import EXEC, TRANSFER
from cpr.migration.statistics import STOPPED_SYNCS, RamCounters, Times
from cpr.phases import mark
from cpr.report import carefully, error_report, unexpected

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.mainloop import MainLoop
    from cpr.migration.channel import Channel, Handed
    from cpr.migration.early import EarlyUpdate
    from cpr.migration.mode import Mode
    from cpr.migration.staging import Staging
    from cpr.migration.state import MigrationState
    from cpr.state.fds import PreservedFds


LAST_WORDS_S = 0.2  # for a reader that takes the end of the stream


class GuestEnded(MigrationError):
    """The guest has ended the VM, which the main loop does next."""


class Cancelled(MigrationError):
    """migrate_cancel came in time."""


def stage(
    machine: Machine,
    fds: PreservedFds,
    state: MigrationState,
    mode: Mode,
    counters: RamCounters,
) -> Staging | None:
    """Makes room for copies of the RAM that the new image could not map as it is, if any.

    Raises MigrationError; then there are none.
    """
    page_size = state.parameters.get("x-cpr-ram-pagesize")
    if mode.name not in (EXEC, TRANSFER) or not (mode.stages or page_size):
        return None
    from cpr.migration import staging

    blocks = staging.wanted(machine, mode.regenerates, page_size)
    if not blocks:
        return None
    if not mode.stages:
        raise MigrationError("x-cpr-ram-pagesize needs x-cpr-ram-staging=on")
    for device in machine.devices:
        if reason := device.copy_blocker():
            raise MigrationError(reason)
    return staging.Staging(machine, fds, state.parameters, blocks, counters, state.emit_pass)


class Outgoing:
    """One migration in `mode`, in status `setup` when it is made.

    `early` is the update with which it goes on, if the guest runs on meanwhile.  `thread_done` is
    held by the thread of any such migration of this VM.
    """

    def __init__(
        self,
        machine: Machine,
        fds: PreservedFds,
        loop: MainLoop,
        handed: Handed,
        state: MigrationState,
        mode: Mode,
        thread_done: LockType,
    ) -> None:
        self.machine = machine
        self.fds = fds
        self.loop = loop
        self.state = state
        self.early: EarlyUpdate | None = None
        self.old_state = runstate.RUNNING
        self.ram = RamCounters()
        self.times = Times()
        self._handed = handed
        self._mode: Mode | None = mode
        self._thread_done = thread_done
        self._switchover = allocate_lock()
        self._cancel = False
        self._written = False
        self._may_run_elsewhere = False  # who reads the stream may have all of it
        self._at_end = False  # what makes it whole is being written
        self._closing = False
        self._ending = allocate_lock()  # the stream is cancelled, or it is written
        self._waits_for_target = False
        self._channel: Channel | None = None
        self._connecting: Cancellation | None = None
        self._saver: savevm.Saver | None = None
        self._staging: Staging | None = None
        state.error = None
        state.set("setup")

    # The start, on the main loop.

    def start(self, address: dict) -> None:
        """Begins what the mode does, and then the thread.  Raises CprError; then it has failed."""
        mode = self._mode
        assert mode is not None
        try:
            savevm.prepare()
            self._staging = stage(self.machine, self.fds, self.state, mode, self.ram)
            mode.prepare(self.machine)
            waits = mode.begin(lambda: self._go_on(address))
            if not waits and not addresses.connects_in_background(address):
                self._open(address)
        except Exception as error:
            raise self.fail_by(error) from None
        self._waits_for_target = waits
        if not waits:
            self._run_soon(None if self._channel is not None else address)

    def _go_on(self, address: dict) -> None:
        """The target of a cpr-transfer is ready."""
        self._waits_for_target = False
        self._run_soon(address)

    def _run_soon(self, address: dict | None) -> None:
        """Starts the thread after this round of the loop: `migrate` is answered before `active`."""

        def start() -> None:
            self._thread_done.acquire()
            try:
                start_new_thread(self._run_thread, (address,))
            except RuntimeError:
                self._thread_done.release()
                self.fail(MigrationError(NO_THREAD))

        self.loop.call_soon(start)

    def _open(self, address: dict) -> None:
        """Opens the channel and, where the mode wants that first, stops the guest."""
        assert self._mode is not None
        try:
            self._connecting = cancellation = Cancellation()
        except OSError as error:
            raise MigrationError(f"descriptors of the migration: {error.strerror}") from None
        try:
            self._check_cancel()  # one that has come before there was anything to interrupt
            self._channel = channel.open_outgoing(address, self._handed, cancellation)
        finally:
            cancellation.close()
        self.times.set_up()
        if self._mode.stops_first and self._staging is None:
            self.stop_guest()

    def stop_guest(self) -> None:
        """Stops the guest for the rest of the migration; `run_on` is the inverse.

        Raises GuestEnded, with the guest stopped, where it has just powered itself off.
        """
        self.times.stop()
        mark("stop")
        if self._mode is not None:
            self._mode.stopped_ns = self.times.stopped_ns
        self.old_state = self.machine.stop(runstate.FINISH_MIGRATE)
        if self.machine.shutdown_requested:
            raise GuestEnded("the guest has powered itself off at that moment")
        if self.old_state == runstate.RUNNING and self.machine.was_suspended:
            self.old_state = runstate.SUSPENDED
        mark("save")

    # The thread.

    def _run_thread(self, address: dict | None) -> None:
        try:
            self._run(address)
        finally:
            self._thread_done.release()

    def _run(self, address: dict | None) -> None:
        """The migration thread; `address` is what is still to be connected to."""
        assert self._mode is not None
        capabilities = self.state.capabilities
        try:
            self._check_cancel()
            if address is not None and self._staging is None:
                self._open(address)
            self._check_cancel()
            self.state.set("active")
            if self._staging is not None:
                self._copy_ram(self._staging, address)
            elif not self._mode.stops_first:
                self.stop_guest()
            assert self._channel is not None
            self.machine.cpr_prepare(self._mode.name)
            self._saver = savevm.Saver(self.machine, capabilities, self._mode, self._channel)
            self._write(self._saver.ram)
            if self._staging is None:
                self.ram = self._saver.counters
                self.state.emit_pass(STOPPED_SYNCS)
            if capabilities.enabled("pause-before-switchover"):
                self._wait_for_switchover()
            self.state.set("device")
            self._write_all()
            with self._ending:
                self._check_cancel()
                self._written = True
            self.times.end()
            self.loop.call_soon(self._complete)
        except Cancelled as error:
            error_report(error)
            self.end("cancelled", str(error))
        except CprError as error:
            if self._cancel:
                self.end("cancelled", str(error))
            else:
                self.fail(error)
        except Exception as error:  # the guest must not be lost to a bug here
            self.fail_by(error)

    def _copy_ram(self, staging: Staging, address: dict | None) -> None:
        """The RAM that is staged: while the guest runs, and what is left when it has stopped."""
        self.times.set_up()
        point("pass")
        staging.live()
        self._check_cancel()
        if address is not None:  # not before: who is connected to does nothing but read
            self._open(address)
        self.stop_guest()
        point("last-pass")
        staging.finish()
        self._check_cancel()

    def _wait_for_switchover(self) -> None:
        self._switchover.acquire(blocking=False)
        self.state.set("pre-switchover")
        self._check_cancel()
        self._switchover.acquire()
        self.let_go()
        self._check_cancel()

    def _check_cancel(self) -> None:
        if self._cancel:
            raise Cancelled(INTERRUPTED)

    def _write(self, step: Callable[[], object]) -> None:
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
        point("devices")
        saver, channel, mode = self._saver, self._channel, self._mode
        assert mode is not None
        if self.state.capabilities.enabled("return-path") and channel.kind != "socket":
            raise MigrationError("Unable to read from file: Bad file descriptor")
        self._write(lambda: saver.devices(self.old_state))
        with self._ending:
            self._check_cancel()
            self._at_end = True
        before = channel.put_out
        try:
            self._write(saver.end)
            self._write(channel.finish)
        finally:
            self._may_run_elsewhere = channel.put_out > before and self._has_reader(channel)

    def _has_reader(self, channel: Channel) -> bool:
        """Whether a VMM that has the stream could run the guest, and nothing says whose it is."""
        mode = self._mode
        assert mode is not None
        if mode.tells_owner:  # but copies of RAM have no lock any more when they are given up
            return not mode.ends_process and self._staging is not None
        ignored = self.state.capabilities.enabled("x-ignore-shared")
        unsent = any(not mode.sends(block, ignored) for block in self.machine.blocks)
        # A command that fails, or is told to end, has no VMM behind it; but RAM may be shared.
        return channel.waits and (unsent or channel.kind != "command")

    # What comes from outside, on the main loop.

    def cancel(self) -> None:
        """The thread ends with `cancelled` as soon as it can; the guest goes on.

        Nothing happens where all is written: whoever has read it may run the guest.  Where the
        rest of it is on its way that is waited for a moment.
        """
        if self._at_end and self._thread_done.acquire(timeout=LAST_WORDS_S):
            self._thread_done.release()
        with self._ending:
            if self._written or not self.state.running:
                return
            self._cancel = True
            self.state.set("cancelling")
        self.let_go()
        self._interrupt()
        if self._waits_for_target:
            self._waits_for_target = False
            self.end("cancelled", None)

    def let_go(self) -> None:
        """Goes on from `pre-switchover`, if that is where it waits."""
        if self._switchover.locked():
            self._switchover.release()

    def _interrupt(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        channel = self._channel
        if channel is not None:
            channel.shutdown()
        if self._staging is not None:
            self._staging.cancel()

    def park(self, timeout: float) -> None:
        """Ends the threads of this migration, waiting so many seconds for that which writes."""
        if self._thread_done.acquire(timeout=timeout):
            self._thread_done.release()
        if self._staging is not None:
            self._staging.park()

    def close(self, exit_status: int) -> None:
        """The VM ends: a new image ends too, and a copy of RAM is rolled back."""
        if self.early is not None:
            self.early.end_vm(exit_status)
            self.early = None
        self._closing = self._cancel = True
        self.let_go()
        self._interrupt()

    def give_up(self) -> None:
        """Undoes what the mode did, once; its thread has ended, or is what calls."""
        if self._mode is not None:
            carefully(self._mode.rollback)
            self._mode = None

    # The end.

    def _complete(self) -> None:
        """Ends a migration whose stream is written, on the main loop.

        Comes back from an exec only where that failed, and the guest runs on.
        """
        mode = self._mode
        assert mode is not None
        self._channel = None
        if self.machine.ends:  # the guest has shut itself down meanwhile
            return
        try:
            point("complete")
            if mode.ends_process:
                self.state.set("completed")
            mode.finish(self.machine)
        except Exception as error:  # the guest must not be lost to a bug here
            expected = _expected(error)
            if mode.gives_back is None and not mode.ended_by:
                error_report(expected)
            self.end("failed", str(expected))
            if mode.gives_back is not None:
                mode.gives_back()  # no command comes in between
            if mode.ended_by:
                error_report(f"terminating on signal {mode.ended_by}")
                self.machine.shutdown(False, "host-signal")
            return
        if self._staging is not None:
            carefully(self._staging.hand_over)
        callbacks = self.state.take_callbacks()
        self.state.set("completed")
        self.state.call_back(callbacks)

    def fail_by(self, error: Exception) -> CprError:
        """Ends as failed by what was raised, expected or not; what is to be told of it."""
        expected = _expected(error)
        self.fail(expected)
        return expected

    def fail(self, error: CprError) -> None:
        self.state.set("failing")
        self.end("failed", str(error))

    def end(self, status: str, error: str | None) -> None:
        """Rollback: the channel, what the mode did, and the vCPUs."""
        if self._channel is not None:
            self._channel.shutdown()  # an exec: command may not be reading, and see nothing else
            self._channel.discard()
            carefully(self._channel.close)
            self._channel = None
        self.give_up()
        self.early = None
        refusal = self.machine.cpr_rollback()
        carefully(self.unstage)
        self.state.error = error
        callbacks = self.state.take_callbacks()
        exec_failed = self.state.status == "completed"
        if exec_failed:
            self._set_last(status)
        carefully(lambda: self._go_back(exec_failed, refusal))
        if not exec_failed:
            self._set_last(status)
        self.state.call_back(callbacks)

    def _set_last(self, status: str) -> None:
        with self._ending:  # no `cancel` comes after it
            self.state.set(status)

    def unstage(self) -> None:
        """Gives up the copies of RAM, if there are any."""
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def run_on(self) -> None:
        """The inverse of `stop_guest`, for a hand-over that did not happen."""
        self._go_back(False, self.machine.cpr_rollback())

    def _go_back(self, exec_failed: bool, refusal: CprError | None) -> None:
        if self.machine.runstate.current != runstate.FINISH_MIGRATE or self._closing:
            return
        reason = str(refusal) if refusal is not None else ""
        if not reason and self._may_run_elsewhere:
            reason = "whoever has read the stream may run it"
        if reason:  # `cont` tries again
            error_report(f"the guest stays stopped: {reason}")
            self.machine.shares_ram = True
            self.machine.leave_guest()
        elif self.old_state in runstate.LIVE:
            self.machine.cont(rollback=True)
        elif exec_failed:
            self.machine.runstate.set(runstate.POSTMIGRATE)  # as QEMU's; nobody else has it
        else:
            self.machine.runstate.set(self.old_state)

    def query(self) -> dict:
        """What query-migrate tells beside the status."""
        status, result = self.state.status, {}
        if status in ("active", "pre-switchover", "device"):
            downtime = self.ram.expected_downtime
            limit = self.state.parameters.get("downtime-limit")
            result["expected-downtime"] = limit if downtime is None else downtime
            result["remaining"] = self.ram.remaining
            result |= self.times.query(False) | {"ram": self.ram.query(self.times)}
        elif status == "completed":
            result |= self.times.query(True) | {"ram": self.ram.query(self.times)}
        return result


def _expected(error: Exception) -> CprError:
    return error if isinstance(error, CprError) else MigrationError(unexpected(error))
