"""The early update of a VM: what the old and the new VMM do between hello and commit.

    EarlyUpdate (old)                         Arrival (new)
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
import time

from cpr import runstate
from cpr.constants import PROGRAM
from cpr.errors import CprError, MigrationError
from cpr.live.messages import Message
from cpr.live.transaction import (
    BACK,
    END,
    ENDING,
    HAND_OVER,
    HELLO,
    PROTOCOL,
    READY,
    REHEARSE,
    STATE,
    Predecessor,
    Update,
    UpdateError,
)
from cpr.mainloop import READ, WRITE
from cpr.migration import savevm
from cpr.migration.capabilities import Capabilities
from cpr.migration.channel import Channel
from cpr.migration.mode import EXEC, device_blockers
from cpr.migration.program import own_command
from cpr.report import error_report, exception_report
from cpr.state import cpr_channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.machine import Machine
    from cpr.mainloop import Timer
    from cpr.migration.cpr_exec import Exec
    from cpr.migration.migration import Migration
    from cpr.state.cpr_state import CprState
    from cpr.state.fds import PreservedFds

MOST_RETURNS = 1
NONE = Capabilities()  # those that the user has set are about streams to anybody
DEATH_MS = 1000  # between the end of a process's descriptors and its own
NS_PER_MS = 1_000_000
SIGNAL_NS = 50_000_000  # how often it is looked whether the new image was sent one that ends the VM


def describe(machine: Machine) -> dict[str, Any]:
    """What a new VMM must have for this guest, as plain data."""
    return {
        "machine": machine.config.machine_type,
        "accel": machine.accel.name,
        "vcpus": len(machine.vcpus),
        "ram": [[block.idstr, block.size] for block in machine.blocks],
        "sections": [
            [device.idstr, device.instance_id, device.vmstate.version_id]
            for device in machine.sections()
            if device.vmstate is not None and device.needed()
        ],
    }


def differences(machine: Machine, wanted: dict[str, Any]) -> list[str]:
    """Why this machine cannot take over a guest of the one that was described; empty if it can."""
    own = describe(machine)
    found = []
    for key, text in (("machine", "machine type"), ("accel", "accelerator"), ("vcpus", "CPUs")):
        if wanted[key] != own[key]:
            found.append(f"{text}: the guest has {wanted[key]}, this VMM would have {own[key]}")
    blocks = dict(own["ram"])
    for idstr, size in wanted["ram"]:
        if idstr not in blocks:
            found.append(f'Unknown ramblock "{idstr}", cannot accept migration')
        elif blocks[idstr] != size:
            found.append(f"Size mismatch: {idstr}: {size:#x} != {blocks[idstr]:#x}")
    versions = {
        (device.idstr, device.instance_id): device.vmstate.version_id
        for device in machine.sections()  # also those that a guest of old makes no use of
        if device.vmstate is not None
    }
    for idstr, instance, version in wanted["sections"]:
        have = versions.get((idstr, instance))
        if have is None:
            found.append(f"the guest has the device '{idstr}' {instance}, this VMM has none")
        elif have < version:
            found.append(f"unsupported version {version} for '{idstr}' v{have}")
    return found


def check_protocol(message: Message) -> None:
    """Raises UpdateError where the new program's hello is of another version than ours."""
    version = message.body.get("protocol")
    if version != PROTOCOL:
        raise UpdateError(
            f"the new program speaks version {version} of the hand-over, this one {PROTOCOL}"
        )


def send_state(update: Update, migration: Migration, state: CprState, failure: str) -> None:
    """Sends what a new VMM builds its machine from; `failure` is why the one before has failed."""
    machine = migration.machine
    body = {
        "program": PROGRAM,
        "guest": describe(machine),
        "cpu": machine.accel.cpu_model(),
        "failure": failure,
    }
    _send(update, STATE, body, state)


def _send(update: Update, kind: str, body: dict, state: CprState | None, stream: int = -1) -> None:
    """Sends a message with a CPR state, and the stream's memfd in front of it."""
    data, fds = b"", [stream] if stream >= 0 else []
    if state is not None:
        for piece, fd in cpr_channel.messages(state):
            data += piece
            fds += [fd] if fd >= 0 else []
    update.send(kind, {**body, "cpr": data.hex()}, fds)


class EarlyUpdate:
    """The old VMM's side.  Owns the Update; `close` is called once, whatever becomes of it."""

    def __init__(
        self, migration: Migration, mode: Exec, timeout_ms: int, update: Update | None = None
    ) -> None:
        """`update` is one whose exec has happened and was refused; it becomes this object's."""
        self._migration = migration
        self._machine = migration.machine
        self._mode = mode
        self._timeout_ms = timeout_ms
        self._timer: Timer | None = None
        self._signal_timer: Timer | None = None
        self._returns = 0
        self._failure = ""
        self._sent: dict[tuple[str, int], int] = {}
        self._stopped = False
        self._closed = False
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
        migration, update = self._migration, self._update
        migration.park()
        try:
            update.execute(
                self._mode.command, os.environ, early=True, timeout_ns=0, holds_signals=True
            )
        except Exception as error:  # the guest must not be lost to a bug here
            if not isinstance(error, CprError):
                exception_report(error)
            migration.unpark()
            self._fail(str(error))
            return
        migration.unpark()
        self._watch()

    def give_back(self, reason: str) -> None:
        """Goes on after a late update that was refused: the old command gets the PID."""
        self._watch()
        self._guarded(lambda: self._on_refusal(reason))

    def _watch(self) -> None:
        loop = self._migration.loop
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
            loop = self._migration.loop
            self._signal_timer = loop.call_later(SIGNAL_NS, self._look_for_signal)

    def _end_by(self, signo: int) -> None:
        error_report(f"terminating on signal {signo}")
        self._machine.shutdown(False, "host-signal")

    def _start_timer(self) -> None:
        self._stop_timer()
        if self._timeout_ms:
            delay = self._timeout_ms * NS_PER_MS
            self._timer = self._migration.loop.call_later(delay, self._on_timeout)

    # What the new image does.

    def _guarded(self, step: Callable[[], None]) -> None:
        """Takes a step of the update; where it fails the guest goes on here."""
        if self._closed:
            return
        try:
            step()
        except CprError as error:
            if self._update.is_dead(DEATH_MS):
                self._on_death(0)
            else:
                self._fail(str(error))
        except Exception as error:  # the guest must not be lost to a bug here
            exception_report(error)
            self._fail(f"internal error: {error}")

    def _on_message(self) -> None:
        message = self._update.receive()
        message.close()
        if message.kind == HELLO:
            self._send_state(message)
        elif message.kind == READY:
            self._migration.set_status("active")
            if self._migration.capabilities.enabled("pause-before-switchover"):
                self._stop_timer()
                self._migration.set_status("pre-switchover")
            else:
                self._hand_over()
        else:
            self._on_refusal(str(message.body.get("reason", "")))

    def continue_(self) -> None:
        """migrate-continue: goes on from pre-switchover."""
        self._guarded(self._hand_over)

    def _send_state(self, message: Message) -> None:
        check_protocol(message)
        machine, fds = self._machine, self._migration.fds
        self._sent = fds.serials()
        send_state(self._update, self._migration, fds.state(), self._failure)
        if machine.runstate.current == runstate.RUNNING:
            savevm.warm_up(machine, NONE, self._mode, True)

    def _hand_over(self) -> None:
        """Stops the guest and sends what is left of it."""
        migration, machine = self._migration, self._machine
        for reason in device_blockers(machine, EXEC):
            raise MigrationError(reason)
        gc.disable()
        machine.accel.saves_cpu_model = False
        self._update.page.struct.stopped_ns = time.monotonic_ns()
        self._stopped = True
        migration.stop_guest()
        machine.cpr_prepare(EXEC)
        migration.set_status("device")
        stream = os.memfd_create("cpr-stream")
        try:
            channel = Channel(os.dup(stream), "file")
            saver = savevm.Saver(machine, NONE, migration.old_state, self._mode, channel)
            saver.ram()
            saver.devices(False)
            channel.finish()
            serials = migration.fds.serials()
            changed = serials != self._sent
            renewed = [key for key in serials if serials[key] != self._sent.get(key, 0)]
            body = {"changed": changed, "renewed": renewed}
            state = migration.fds.state() if changed else None
            _send(self._update, HAND_OVER, body, state, stream)
        except OSError as error:
            raise MigrationError(f"memfd of the hand-over: {error.strerror}") from None
        finally:
            os.close(stream)
        migration.loop.watch(self._update.token, WRITE, self._on_commit)

    def _on_commit(self, events: int) -> None:
        """The new image has the guest: nothing more is done here than to say so."""
        self._migration.set_status("completed")
        self._migration.before_exec()
        self._update.leave()

    def _on_refusal(self, reason: str) -> None:
        """The new image cannot take over; where the old program is still there, it has the PID."""
        self._failure = self._failure or reason
        if self._returns >= MOST_RETURNS or self._migration.files.changed():
            self._fail(self._failure)
            return
        self._returns += 1
        self._run_on()
        self._migration.set_status("setup")
        body = {"argv": own_command(), "cwd": os.getcwd(), "environment": dict(os.environ)}
        self._update.send(BACK, body)
        self._start_timer()

    def _on_death(self, events: int) -> None:
        if self._closed:
            return
        status = self._update.exit_status()
        signo = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else 0
        signo = signo if signo in ENDING else self._update.pending_signal()
        if signo and self._update.take_back():
            self.close()
            self._end_by(signo)
            return
        from cpr.live.token import describe_status

        self._fail(
            self._failure or f"the new program {describe_status(status)} before it took over"
        )

    def _on_timeout(self) -> None:
        self._fail(
            self._failure
            or f"the new program did not take over within {self._timeout_ms} ms, and was killed"
        )

    # The end.

    def _fail(self, reason: str, status: str = "failed") -> None:
        """The guest goes on here, or has gone to the new image already."""
        if self._closed:
            return
        if not self._update.take_back():
            self._on_commit(0)
        new_pid = self._update.pid not in (0, os.getpid())
        self.close()
        if new_pid:
            self._migration.on_new_pid()
            reason += f"; the guest goes on in the old VMM, PID {os.getpid()}"
        error_report(f"the update failed: {reason}")
        self._run_on()
        self._migration.end(status, reason)

    def _run_on(self) -> None:
        """Takes the guest back from a hand-over that did not happen."""
        if self._stopped:
            self._stopped = False
            self._machine.accel.saves_cpu_model = True
            gc.enable()
            self._migration.loop.unwatch(self._update.token)
            self._migration.run_on()

    def cancel(self) -> None:
        """migrate_cancel: the new image is killed, and the guest goes on here."""
        self._fail("Switchover is interrupted", "cancelled")

    def end_vm(self, status: int) -> None:
        """The VM ends here: the new image ends with `status`, whatever it is doing."""
        if self._closed:
            return
        from cpr.live.token import take_token

        if not take_token(self._update.token):  # it has the guest since a moment ago
            os.kill(self._update.pid, signal.SIGTERM)
            self._update.leave()
        self._update.end(status)
        self.close()

    def close(self) -> None:
        """Gives up the update's descriptors; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._stop_timer()
        if self._signal_timer is not None:
            self._signal_timer.cancel()
        for fd in (self._update.fileno(), self._update.pidfd, self._update.token):
            self._migration.loop.unwatch(fd)
        self._update.close()


class Arrival:
    """The new VMM's side of an early update, or of a rehearsal."""

    def __init__(self, predecessor: Predecessor) -> None:
        self._predecessor = predecessor
        self._guest: dict[str, Any] = {}
        self._cpu: Any = None
        self.failure = ""
        """Why an update failed whose old command this is; empty for a new program."""

    @property
    def rehearses(self) -> bool:
        return self._predecessor.mode == REHEARSE

    def receive_state(self, fds: PreservedFds) -> None:
        """Asks for the CPR state and takes it over.  Raises CprError."""
        self._predecessor.hello(PROGRAM)
        message = self._predecessor.receive(STATE)
        self._guest, self._cpu = message.body["guest"], message.body["cpu"]
        self.failure = str(message.body["failure"])
        fds.take_over(_decode(message))

    def check(self, machine: Machine) -> None:
        """Raises MigrationError with all that speaks against taking the guest over."""
        reasons = differences(machine, self._guest)
        if reasons:
            raise MigrationError("; ".join(reasons))
        machine.accel.adopt_cpu_model(self._cpu)

    def rehearsed(self) -> None:
        """This VMM could take over: says so, and waits to be thanked.  Does not come back."""
        self._predecessor.send(READY)
        self._predecessor.receive(END)

    def receive_guest(self, fds: PreservedFds) -> Channel:
        """Says that all is ready, and waits for the guest: its stream, which is the caller's."""
        self._predecessor.send(READY)
        message = self._predecessor.receive(HAND_OVER)
        stream = message.fds.pop(0)
        os.lseek(stream, 0, os.SEEK_SET)
        if message.body["changed"]:
            renewed = {(name, id) for name, id in message.body["renewed"]}
            fds.replace(_decode(message), renewed)
        return Channel(stream, "file")

    def commit(self) -> None:
        """The guest is this VMM's.  Ends the process where the old VMM has ended meanwhile."""
        try:
            self._predecessor.commit()
        except UpdateError:
            self._predecessor.receive(END)
            raise


def _decode(message: Message) -> CprState:
    """The CPR state of a message, whose descriptors are the caller's from now on."""
    descriptors, message.fds = message.fds, []
    try:
        return cpr_channel.decode(bytes.fromhex(message.body["cpr"]), descriptors)
    except Exception:
        for fd in descriptors:
            os.close(fd)
        raise
