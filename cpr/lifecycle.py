"""How a machine runs, stops, sleeps, is reset and ends."""

from __future__ import annotations

import time
from _thread import RLock
from functools import partial

from cpr import boot, report, runstate
from cpr.clock import VirtualClock
from cpr.constants import MIB
from cpr.errors import CommandError, CprError
from cpr.faults import point
from cpr.reserve import Reserve
from cpr.runstate import RunState
from cpr.vcpus import VCPUS_FIRST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.accel.base import Accelerator, VCpu
    from cpr.boot import BootImage
    from cpr.config import Config
    from cpr.devices.base import Device
    from cpr.events import EventBus
    from cpr.mainloop import MainLoop
    from cpr.memory import GuestMemory
    from cpr.vcpus import VCpuThread


class Lifecycle:
    """What a VM does as a whole; `machine.Machine` is one, and says what it is made of.

    `stop`, `cont`, `reset` and `wakeup` are for the main loop or the migration thread, never for
    a vCPU's own thread and never with `lock` held.  What ends the VM is reported by
    `on_exit(status)`, set by whoever owns the process; `ended` is true from then on.
    `was_suspended`: a stopped guest slept before, and `cont` brings it back to that.
    `has_left`: another VMM may have the guest, and has given it back only where it ended.
    `advances_clock()`: the guest's clock is to go on while the guest stands still, which it does
    since `stopped_at`, in ns of the host's wall clock (None: it has not run).  `interrupted()`:
    what ends the VM has come, and waits for the main loop.  `catches_up`: the
    guest comes from a VMM that wanted this.  `shares_ram`: the guest has gone to another VMM, which
    has mapped the same RAM.
    """

    def __init__(
        self,
        config: Config,
        accel: Accelerator,
        memory: GuestMemory,
        loop: MainLoop,
        events: EventBus,
    ) -> None:
        self.config = config
        self.accel = accel
        self.memory = memory
        self.loop = loop
        self.events = events
        self.lock = RLock()
        self.clock = VirtualClock()
        self.runstate = RunState(runstate.PRELAUNCH)
        self.devices: list[Device] = []
        self.vcpus: list[VCpu] = []
        self.threads: list[VCpuThread] = []
        self.boot_image: Callable[[], BootImage] | None = None
        self.on_exit: Callable[[int], None] = lambda status: None
        self.interrupted: Callable[[], bool] = lambda: False
        self.ended = self.has_left = False
        self.was_suspended = False
        self.shares_ram = False
        self.advances_clock: Callable[[], bool] = lambda: False
        self.catches_up = False
        self.stopped_at: int | None = None
        self._reset_requested: tuple[bool, str] | None = None
        self._shutdown_requested = self._exit_requested = False
        self._suspend_requested = False
        self._parked: list[bool] = []
        self._reserve: Reserve | None = None
        self._state_lock = RLock()

    # What a device, a vCPU or the monitor asks for: done soon, by the main loop.

    def request_shutdown(self, guest: bool, reason: str) -> None:
        """Ends the VM soon; from any thread, also a vCPU's."""
        if not self._shutdown_requested:
            self._shutdown_requested = True
            self.loop.call_soon(lambda: self.shutdown(guest, reason))

    @property
    def shutdown_requested(self) -> bool:
        """Whether the main loop has `shutdown` to do, or `on_exit`."""
        return self._shutdown_requested or self._exit_requested

    def request_reset(self, guest: bool, reason: str) -> None:
        """Resets the VM soon; from any thread.  With -no-reboot it ends the VM instead."""
        if self.config.no_reboot and guest:
            self.request_shutdown(guest, reason)
        elif self._reset_requested is None:
            self._reset_requested = (guest, reason)
            self.loop.call_soon(self._reset)

    def request_suspend(self) -> None:
        """Puts the VM to sleep soon (ACPI S3); from any thread."""
        self._suspend_requested = True
        self.loop.call_soon(self._suspend)

    def request_error(self, error: CprError) -> None:
        """Stops the VM in runstate internal-error; from any thread."""
        report.error_report(error)
        self.request_stop(runstate.INTERNAL_ERROR)

    def request_stop(self, state: str) -> None:
        """Stops the VM soon, in run state `state`; from any thread."""
        self.loop.call_soon(lambda: self._stop_running(state))

    @property
    def ends(self) -> bool:
        """Whether the VM has ended, or does so with this round of the main loop."""
        return self.ended or self.loop.stopping

    @property
    def suspended(self) -> bool:
        state = self.runstate.current
        return state == runstate.SUSPENDED or (state not in runstate.LIVE and self.was_suspended)

    def request_exit(self, status: int) -> None:
        """Ends the VM soon with this exit status, and no event; from any thread."""
        self._exit_requested = True
        self.loop.call_soon(lambda: self.on_exit(status))

    # Running and stopping.

    def resume_vcpus(self) -> None:
        """Lets the clock and the vCPUs go; `pause_vcpus` is the inverse.  No event is sent.

        What a device cannot do is said, and no reason to stop half way: the guest would be lost.
        """
        with self.lock:
            now, advance = time.monotonic_ns(), self._take_advance()
            self.clock.enable(now - advance)
            for device in self.devices:
                report.carefully(device.on_run)
            report.carefully(lambda: self.accel.start_time(now, advance))
        for thread in self.threads:
            thread.resume()

    def _take_advance(self) -> int:
        """How far the guest's clock is ahead of where it was stopped, in ns, when it goes on."""
        stopped_at, self.stopped_at = self.stopped_at, None
        advances, self.catches_up = self.catches_up or self.advances_clock(), False
        return max(0, time.time_ns() - stopped_at) if advances and stopped_at is not None else 0

    def request_pause(self) -> None:
        """The vCPUs leave the guest soon; `stop` comes next, and waits for that."""
        for thread in self.threads:
            thread.request_pause()

    def withdraw_pause(self) -> None:
        """The inverse of `request_pause` where no `stop` has come."""
        for thread in self.threads:
            thread.withdraw_pause()

    def pause_vcpus(self) -> None:
        """Nothing happens where they are paused, as those of a suspended guest are."""
        if not self.clock.enabled:
            return
        self.request_pause()
        for thread in self.threads:
            thread.pause()
        with self.lock:
            now = time.monotonic_ns()
            report.carefully(lambda: self.accel.stop_time(now))
            self.clock.disable(now)
            self.stopped_at = time.time_ns()
            for device in self.devices:
                report.carefully(device.on_stop)

    def park(self) -> None:
        """Ends the vCPUs' threads, and those of devices, for the moment of an exec.

        The guest does not notice: its clock goes on.  `unpark` is the inverse, to be called too
        where this raises MemoryError: there would be none to start them again.
        """
        self._parked = [thread.running for thread in self.threads]
        self._reserve = Reserve(len(self.threads))
        self.request_pause()
        for thread in self.threads:
            thread.end()
            point("park")
        with self.lock:
            for device in self.devices:
                device.park()

    def unpark(self) -> None:
        """Starts the threads again that have ended, and those vCPUs that ran.

        Waits for threads that cannot start, but not where the VM ends.
        """
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None
        with self.lock:
            for device in self.devices:
                device.unpark()
        for thread, was_running in zip(self.threads, self._parked, strict=True):
            if thread.has_ended:
                try:
                    thread.start(self.interrupted)
                except RuntimeError:
                    return
                if waited := thread.waited_ns:
                    report.carefully(partial(thread.vcpu.on_new_thread, waited, self.memory))
            else:
                thread.pause()
            if was_running:
                thread.resume()
        if any(self._parked):
            time.sleep(VCPUS_FIRST)

    def stop(self, new_state: str = runstate.PAUSED) -> str:
        """vm_stop: pauses a running VM into `new_state`, with a STOP event if it was running.

        A reset or a sleep that the guest has asked for is done before, so that no saved state
        misses it.  Returns the run state that it left.
        """
        with self._state_lock:
            old_state = self.runstate.current
            was_running = old_state in runstate.LIVE
            if was_running:
                self.was_suspended = old_state == runstate.SUSPENDED
                self.pause_vcpus()
                if not self.reset_if_requested():  # it does not go on where it was, anywhere
                    old_state = runstate.INTERNAL_ERROR
                    new_state = old_state if new_state == runstate.PAUSED else new_state
                if self._suspend_requested:
                    self._suspend_requested = False
                    self.was_suspended = True
                    self.events.emit("SUSPEND")
            else:
                self._reset_stopped()
                old_state = self.runstate.current
                if new_state == runstate.PAUSED:
                    return old_state
            self.runstate.set(new_state)
            if was_running:
                self.events.emit("STOP")
            return old_state

    def check_finalized(self) -> None:
        """Raises CommandError where the guest, or what was changed of it, may be another VMM's."""
        if self.runstate.current == runstate.FINISH_MIGRATE:
            raise CommandError("Migration is not finalized yet")

    def cont(self, rollback: bool = False) -> None:
        """vm_start: lets a stopped VM run, with a RESUME event, after a reset that is due.

        Raises CommandError in a migration, unless this is its `rollback`: another VMM may have the
        guest in the next moment.
        """
        with self._state_lock:
            if self.runstate.current in runstate.LIVE:
                return
            if not rollback:
                self.check_finalized()
            self.shares_ram = False
            is_reset = self._reset_to_go_on()
            if self.runstate.current in (runstate.SHUTDOWN, runstate.INTERNAL_ERROR):
                raise CommandError("Resetting the Virtual Machine is required")
            if self.was_suspended:
                self.runstate.set(runstate.SUSPENDED)
                self.events.emit("RESUME")
                return
            self.runstate.set(runstate.RUNNING)
            if not is_reset:
                self.stop(runstate.INTERNAL_ERROR)
                return
            self.events.emit("RESUME")
            self.resume_vcpus()

    def _suspend(self) -> None:
        with self._state_lock:
            requested, self._suspend_requested = self._suspend_requested, False
            if requested and self.runstate.current == runstate.RUNNING:
                self.pause_vcpus()
                self.runstate.set(runstate.SUSPENDED)
                self.events.emit("SUSPEND")

    def wakeup(self) -> None:
        """system_wakeup: vCPUs and devices are reset, and RAM is kept.

        vCPU 0 goes on where the guest's ACPI tables say, else it boots.  Raises CommandError where
        the guest is not asleep.
        """
        with self._state_lock:
            if self.runstate.current != runstate.SUSPENDED:
                raise CommandError("Unable to wake up: guest is not in suspended state")
            registers = self._waking_registers()
            with self.lock:
                for device in self.devices:
                    device.reset()
                for device in self.devices:
                    device.on_wakeup()
            self.vcpus[0].set_state(registers)
            self.accel.apply_state()
            self.was_suspended = False
            self.runstate.set(runstate.RUNNING)
            self.events.emit("WAKEUP")
            self.resume_vcpus()

    def _waking_registers(self) -> dict:
        from cpr.acpi.tables import FACS_ADDRESS, FACS_SIZE, waking_vector

        vector = waking_vector(self.memory.read(FACS_ADDRESS, FACS_SIZE))
        if 0 < vector < MIB:  # in real mode
            return boot.waking_registers(vector)
        assert self.boot_image is not None
        return self.boot_image().registers

    def reset(self) -> None:
        """system_reset: asked for by the host, never turned into a shutdown."""
        self.request_reset(False, "host-qmp-system-reset")

    def powerdown(self) -> None:
        """system_powerdown: presses the ACPI power button.

        Raises CommandError in a migration, in which the button's state has been saved.
        """
        self.check_finalized()
        self.events.emit("POWERDOWN")
        with self.lock:
            for device in self.devices:
                device.on_powerdown()

    def _reset(self) -> None:
        with self._state_lock:
            if self.runstate.current not in runstate.LIVE:
                self._reset_stopped()
                return
            self.pause_vcpus()
            self.runstate.set(runstate.RUNNING)
            self.was_suspended = False
            if self.reset_if_requested():
                self.resume_vcpus()
            else:
                self.runstate.set(runstate.INTERNAL_ERROR)
                self.events.emit("STOP")

    def _reset_stopped(self) -> None:
        """Of a VM that is not live, whose RAM may be that of another image's guest.

        A guest that may come back is reset by `cont`; one that is still to come in is not there.
        """
        state = self.runstate.current
        if state == runstate.INMIGRATE:
            self._end_reset()
        elif state != runstate.FINISH_MIGRATE and not self.shares_ram:
            self._reset_to_go_on()

    def _reset_to_go_on(self) -> bool:
        """`reset_if_requested` of a VM that is not live, which can go on then."""
        due, done = self._reset_requested is not None, self.reset_if_requested()
        if due and done and self.runstate.current in (runstate.SHUTDOWN, runstate.INTERNAL_ERROR):
            self.runstate.set(runstate.PAUSED)
        return done

    def reset_if_requested(self) -> bool:
        """Resets the paused VM if that is due; false where its boot image cannot be read."""
        if self._reset_requested is None:
            return True
        self.was_suspended = self._suspend_requested = False
        try:
            self.load_boot_image()
        except Exception as error:  # the VM must not be left as one that runs and does not
            self._reset_requested = None
            known = isinstance(error, CprError)
            report.error_report(f"reset failed: {error if known else report.unexpected(error)}")
            return False
        self._end_reset()
        return True

    def _end_reset(self) -> None:
        if self._reset_requested is not None:
            guest, reason = self._reset_requested
            self._reset_requested = None
            self.events.emit("RESET", {"guest": guest, "reason": reason})

    def shutdown(self, guest: bool, reason: str) -> None:
        """Ends the VM now, with a SHUTDOWN event; with -no-shutdown the guest only stops."""
        self.events.emit("SHUTDOWN", {"guest": guest, "reason": reason})
        if guest and self.config.no_shutdown:
            self.stop(runstate.SHUTDOWN)
        else:
            self.ended = True
            self.on_exit(0)
        self._shutdown_requested = False  # not before: a migration that stops the guest looks

    def _stop_running(self, state: str) -> None:
        """One that has been stopped meanwhile stays as it is: it finds the same when it goes on."""
        with self._state_lock:
            if self.runstate.current in runstate.LIVE:
                self.stop(state)

    # Power-on.

    def load_boot_image(self) -> None:
        """Power-on: the boot image into RAM, vCPUs and devices to their initial state.

        Raises ConfigError where the image cannot be read.
        """
        assert self.boot_image is not None
        registers = self.boot_image().load(self.memory)
        with self.lock:
            for device in self.devices:
                device.reset()
        self.vcpus[0].set_state(registers)
        self.accel.apply_state()

    def keep_boot_image(self) -> None:
        """Reads the boot image for all resets to come: its file will be out of reach.

        One that cannot be read is none that a reset could use later either.
        """
        assert self.boot_image is not None
        try:
            image = self.boot_image()
        except CprError:
            return
        self.boot_image = lambda: image
