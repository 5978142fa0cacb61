"""The early update of a VM: what the old and the new VMM do between hello and commit.

    EarlyUpdate (old, here)                   arrival.Arrival (new)
    hello: the CPR state, what the guest   →  builds the machine, checks that it can have this
           has, why the last one failed       guest, populates RAM
    ready: stops the guest, saves it       →  loads it, commits, runs it
    the token is gone: this process ends

The old VMM serves its guest, its devices and its monitors in between, on the main loop as ever.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from functools import partial

from cpr import runstate
from cpr.constants import NS_PER_MS
from cpr.errors import CprError, MigrationError
from cpr.faults import point
from cpr.live.old_image import Update
from cpr.live.transaction import (
    BACK,
    ENDING,
    HAND_OVER,
    HELLO,
    KEEPS,
    RAM_FILES,
    READY,
    UpdateError,
)
from cpr.mainloop import READ, WRITE
from cpr.migration import savevm
from cpr.migration.cancellation import INTERRUPTED
from cpr.migration.capabilities import Capabilities
from cpr.migration.channel import MemoryChannel
from cpr.migration.connections import send_all
from cpr.migration.hand_over import check_protocol, send, send_state
from cpr.migration.mode import EXEC, device_blockers
from cpr.migration.outgoing import GuestEnded
from cpr.migration.placement import Placement
from cpr.migration.program import Held, end_started, own_command
from cpr.report import carefully, error_report, unexpected

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.live.messages import Message
    from cpr.live.program_files import ProgramFiles
    from cpr.mainloop import Timer
    from cpr.migration.cpr_exec import Exec
    from cpr.migration.outgoing import Outgoing
    from cpr.migration.process import Process

MOST_RETURNS = 1
NONE = Capabilities()  # those that the user has set are about streams to anybody
LONG_INTERVAL = 0.005
"""Of switches between threads, in s: a vCPU that is stopped need not be served soon."""
REST = 0.003
"""For so long, in s, the CPUs are the new image's that has been sent the guest."""
SETTLE_NS = 5 * NS_PER_MS  # that the vCPUs have to themselves after an exec
HOLD_NS = 200 * NS_PER_MS  # for a new image that has the guest and has not taken it
DEATH_MS = 1000  # between the end of a process's descriptors and its own
SIGNAL_NS = 50 * NS_PER_MS
"""How often it is looked whether the new image was sent a signal that ends the VM."""


class EarlyUpdate:
    """The old VMM's side.  Owns the Update; `close` is called once, whatever becomes of it."""

    def __init__(
        self,
        outgoing: Outgoing,
        mode: Exec,
        process: Process,
        files: ProgramFiles,
        update: Update | None = None,
    ) -> None:
        """`update` is one whose exec has happened and was refused; it becomes this object's."""
        self._outgoing = outgoing
        self._machine = outgoing.machine
        self._loop = outgoing.loop
        self._state = outgoing.state
        self._mode = mode
        self._process = process
        self._files = files
        self._timeout_ms = mode.timeout_ms
        self._timer: Timer | None = None
        self._signal_timer: Timer | None = None
        self._returns = 0
        self._failure = ""
        self._sent: dict[tuple[str, int], int] = {}
        self._known: dict[tuple[str, int], bytes] = {}
        self._keeps = self._hands_files = False
        self._hold_timer: Timer | None = None
        self._native = False
        self._stopped = False
        self._switch_interval = 0.0
        self._closed = False
        self._placement = Placement.of(self._machine.threads)
        if update is not None:
            self._update = update
            return
        mappings = [(block.host, block.max_length) for block in self._machine.blocks]
        try:
            self._update = Update(mappings)
        except UpdateError as error:
            raise MigrationError(str(error)) from None

    def execute(self) -> None:
        """Becomes the command, and goes on in the guard; or the update fails."""
        try:
            self._placement.keep_away()
            self._update.execute(
                self._mode.command,
                os.environ,
                early=True,
                timeout_ns=self._mode.timeout_ms * NS_PER_MS,
                holds_signals=True,
                cpus=self._placement.guest_cpus,
                park=self._process.park,
                unpark=self._unpark,
            )
        except UpdateError as error:
            self._go_on(error.ended_by, str(error))
        except Exception as error:  # the guest must not be lost to a bug here
            self._fail(unexpected(error))
        else:
            carefully(self._process.lock_ram)  # the exec has given it up
            self._guarded(self._watch)

    def _unpark(self) -> None:
        self._process.unpark()
        self._loop.call_later(SETTLE_NS, self._settle)

    def _settle(self) -> None:
        """Nothing but the vCPUs is kept on their CPUs while the new image starts."""
        if not self._closed and not self._stopped:
            self._placement.give_back(self._machine.threads)

    def give_back(self, reason: str) -> None:
        """Goes on after a late update that was refused: the old command gets the PID."""
        self._guarded(self._watch)
        self._guarded(lambda: self._on_refusal(reason))

    def _watch(self) -> None:
        loop = self._loop
        loop.watch(self._update.fileno(), READ, lambda events: self._guarded(self._on_message))
        loop.watch(self._update.pidfd, READ, self._on_death)
        self._start_timer()
        self._look_for_signal()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_for_signal(self) -> None:
        """The PID is the VM's: a signal that the new image cannot take yet is for the whole VM."""
        if signo := self._update.pending_signal():
            self._signal_timer = None
            self._end_by(signo)
        else:
            self._signal_timer = self._loop.call_later(SIGNAL_NS, self._look_for_signal)

    def _end_by(self, signo: int) -> None:
        error_report(f"terminating on signal {signo}")
        self._machine.shutdown(False, "host-signal")

    def _start_timer(self) -> None:
        self._stop_timer()
        if self._timeout_ms:
            delay = self._timeout_ms * NS_PER_MS
            self._timer = self._loop.call_later(delay, self._on_timeout)

    # What the new image does.

    def _guarded(self, step: Callable[[], None]) -> None:
        """Takes a step of the update; where it fails the guest goes on here."""
        if self._closed:
            return
        try:
            step()
        except GuestEnded as error:  # with an exit status that the PID is to have
            self._machine.events.release()
            self._loop.call_soon(partial(self._fail_unless_ended, str(error)))
        except CprError as error:
            if self._update.is_dead(DEATH_MS):
                self._on_death(0)
            else:
                self._fail(str(error))
        except Exception as error:  # the guest must not be lost to a bug here
            self._fail(unexpected(error))

    def _on_message(self) -> None:
        message = self._update.receive()
        message.close()
        if message.kind == HELLO:
            self._send_state(message)
        elif message.kind == READY:
            self._native = bool(message.body.get("native"))
            self._state.set("active")
            asks = self._state.capabilities.enabled("pause-before-switchover")
            if asks and not self._failure:  # the way back needs no second permission
                self._stop_timer()
                self._state.set("pre-switchover")
            else:
                self._hand_over()
        else:
            self._on_refusal(message.reason)

    def continue_(self) -> None:
        """migrate-continue: goes on from pre-switchover."""
        self._start_timer()
        self._guarded(self._hand_over)

    def _send_state(self, message: Message) -> None:
        point("hello")
        check_protocol(message)
        versions = message.body.get("versions", [])
        self._keeps, self._hands_files = KEEPS in versions, RAM_FILES in versions
        machine, fds = self._machine, self._outgoing.fds
        self._sent = fds.serials()
        stream, self._known = b"", {}
        if machine.runstate.current == runstate.RUNNING:
            stream, self._known = savevm.save_running(machine, self._mode)
        send_state(
            self._update,
            machine,
            fds.state(self._hands_files),
            self._failure,
            self._placement,
            self._known,
            stream,
        )

    def _hand_over(self) -> None:
        """Stops the guest and sends what is left of it."""
        outgoing, machine, fds = self._outgoing, self._machine, self._outgoing.fds
        for reason in device_blockers(machine, EXEC):
            raise MigrationError(reason)
        channel = MemoryChannel()
        saver = savevm.Saver(machine, NONE, self._mode, channel)
        saver.ram()
        self._switch_interval = sys.getswitchinterval()
        self._stopped = True  # from here on there is something to undo
        gc.disable()
        machine.accel.saves_cpu_model = False
        machine.accel.saves_native = self._native
        self._placement.bring(self._update.pid)
        machine.events.hold()
        self._placement.hand_over()
        if self._known:
            savevm.save_again(machine, self._mode, self._known)
        sys.setswitchinterval(LONG_INTERVAL)
        self._update.page.struct.stopped_ns = time.monotonic_ns()
        machine.request_pause()
        outgoing.stop_guest()
        machine.cpr_prepare(EXEC)
        self._state.set("device")
        bodies = saver.devices(outgoing.old_state, known=self._known)
        saver.end(described=False)
        serials = fds.serials()
        changed = serials != self._sent
        renewed = [key for key in serials if serials[key] != self._sent.get(key, 0)]
        kept = [key for key, body in bodies.items() if self._known.get(key) == body]
        body = {"changed": changed, "renewed": renewed, "kept": kept}
        point("hand-over")
        state = fds.state(self._hands_files) if changed else None
        send(self._update, HAND_OVER, body, state, channel.written())
        time.sleep(REST)  # at once: to go to another CPU first would keep the new image waiting
        self._placement.keep_away()
        machine.events.release()
        self._hold_commands()
        self._loop.watch(self._update.token, WRITE, self._on_commit)

    def _hold_commands(self) -> None:
        """What a client says now is for the new image, but not for ever."""
        if self._keeps:
            self._process.hold_commands(True)
            self._hold_timer = self._loop.call_later(HOLD_NS, self._let_commands_go)

    def _let_commands_go(self) -> None:
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None
            self._process.hold_commands(False)

    def _on_commit(self, events: int) -> None:
        """The new image has the guest: nothing more is done here than to say so."""
        if self._update.has_token:  # it is gone because this image has taken it
            self._loop.unwatch(self._update.token)
            return
        carefully(lambda: point("leave"))
        if self._returns:  # the program that has refused may have started others
            carefully(lambda: end_started(Held(self._update.page.fd), self._update.pid))
        carefully(lambda: self._state.set("completed"))
        carefully(self._process.before_exec)
        if self._keeps:
            carefully(lambda: send_all(self._update, self._process.connections()))
        self._update.leave()

    def _on_refusal(self, reason: str) -> None:
        """The new image cannot take over; where the old program is still there, it has the PID."""
        self._failure = self._failure or reason
        if self._returns >= MOST_RETURNS or self._files.changed():
            self._fail(self._failure)
            return
        self._returns += 1
        try:
            folder = os.getcwd()
        except OSError as error:  # it has been removed
            self._fail(f"{self._failure}; its folder: {error.strerror}")
            return
        self._run_on()
        self._placement.keep_away()
        point("give-back")
        self._state.set("setup")
        body = {"argv": own_command(), "cwd": folder, "environment": dict(os.environ)}
        self._update.send(BACK, body)
        self._start_timer()

    def _on_death(self, events: int) -> None:
        if self._closed:
            return
        status = self._update.exit_status()
        signo = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else 0
        signo = signo if signo in ENDING else self._update.pending_signal()
        from cpr.live.token import describe_status

        self._go_on(signo, f"the new program {describe_status(status)} before it took over")

    def _go_on(self, signo: int, reason: str) -> None:
        """There is no new image any more; one that `signo` has ended was meant with the old one."""
        if signo and self._update.take_back():
            carefully(self.close)
            self._end_by(signo)
        else:
            self._fail(self._failure or reason)

    def _on_timeout(self) -> None:
        self._fail(
            self._failure
            or f"the new program did not take over within {self._timeout_ms} ms, and was killed"
        )

    # The end.

    def _fail_unless_ended(self, reason: str) -> None:
        if not self._machine.ends:
            self._fail(reason)

    def _fail(self, reason: str, status: str = "failed") -> None:
        """The guest goes on here, or has gone to the new image already."""
        if self._closed:
            return
        if not self._update.take_back():
            self._on_commit(0)
        new_pid = self._update.pid not in (0, os.getpid())
        page, new_image = Held(self._update.page.fd), self._update.pid
        carefully(self.close)
        if new_pid:
            self._process.on_new_pid()
            reason += f"; the guest goes on in the old VMM, PID {os.getpid()}"
        error_report(f"the update failed: {reason}")
        carefully(self._run_on)
        if new_pid:
            carefully(lambda: end_started(page, new_image))
        self._outgoing.end(status, reason)

    def _run_on(self) -> None:
        """Takes the guest back from a hand-over that did not happen."""
        self._let_commands_go()
        if self._stopped:
            self._stopped = False
            self._machine.accel.saves_cpu_model = True
            self._machine.accel.saves_native = False
            gc.enable()
            sys.setswitchinterval(self._switch_interval)
            self._loop.unwatch(self._update.token)
            self._machine.events.release()
            self._outgoing.run_on()
            self._machine.withdraw_pause()  # it has failed before the guest was stopped

    def cancel(self) -> None:
        """migrate_cancel: the new image is killed, and the guest goes on here."""
        self._fail(INTERRUPTED, "cancelled")

    def end_vm(self, status: int) -> None:
        """The VM ends here: the new image ends with `status`, whatever it is doing."""
        if self._closed:
            return
        if not self._update.take():  # it has the guest since a moment ago
            os.kill(self._update.pid, signal.SIGTERM)
            self._update.leave()
        self._update.end(status)
        self.close()

    def close(self) -> None:
        """Gives up the update's descriptors; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._let_commands_go()
        self._placement.give_back(self._machine.threads)
        self._stop_timer()
        if self._signal_timer is not None:
            self._signal_timer.cancel()
        for fd in (self._update.fileno(), self._update.pidfd, self._update.token):
            self._loop.unwatch(fd)
        self._update.close()
