"""The parts of one VMM process, by name: what a monitor's command gets."""

from __future__ import annotations

import os
from functools import partial

from cpr import runstate
from cpr.constants import NS_PER_MS
from cpr.errors import CommandError, ConfigError, CprError
from cpr.faults import point
from cpr.live import guard
from cpr.mainloop import READ
from cpr.migration import channel
from cpr.migration.process import Process
from cpr.ram_backend import hold
from cpr.report import carefully, error_report, exception_report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.chardev.base import Chardev
    from cpr.config import Config, MonitorConfig
    from cpr.machine import Machine
    from cpr.mainloop import MainLoop
    from cpr.migration.migration import Migration
    from cpr.monitor.passed_fds import PassedFds
    from cpr.state.connections import Kept
    from cpr.state.fds import PreservedFds
    from cpr.vmm.connections import Arrived
    from cpr.vmm.daemon import Pidfile
    from cpr.vmm.populate import Populator

FLUSH_NS = 200 * NS_PER_MS
LOCK_NS = 50 * NS_PER_MS


class Vmm(Process):
    """Owns them all; `close` is the inverse.  `signal_has_come()` as `interrupted`."""

    def __init__(
        self,
        config: Config,
        machine: Machine,
        migration: Migration,
        loop: MainLoop,
        passed_fds: PassedFds,
    ) -> None:
        super().__init__(machine)
        self.config = config
        self.migration = migration
        self.loop = loop
        self.events = machine.events
        self.chardevs: dict[str, Chardev] = {}
        self.monitors: list[tuple[MonitorConfig, Any]] = []
        self.passed_fds = passed_fds
        self.populator: Populator | None = None
        self._was_populating = False
        self._untold: set[int] = set()
        self._going: dict[str, Kept] = {}  # in a late update
        self.pidfile: Pidfile | None = None
        self.exit_status = 0
        self.signal_has_come: Callable[[], bool] = lambda: False
        machine.on_exit = self._exit
        machine.interrupted = self.interrupted
        migration.process = self
        channel.reap_later = self.reap_child

    def quit(self, reason: str) -> None:
        """Ends the process from the host's side, with a SHUTDOWN event."""
        self.machine.shutdown(False, reason)

    def _exit(self, status: int) -> None:
        self.exit_status = status
        self.loop.stop()

    def before_exec(self) -> None:
        for chardev in self.chardevs.values():
            chardev.flush()  # the guest waits for no client

    def park(self) -> None:
        """Ends all threads but the main loop's, for an exec; `unpark` is the inverse."""
        self._was_populating = self._end_populator()
        self.machine.park()

    def _end_populator(self) -> bool:
        """False where there was none."""
        populator, self.populator = self.populator, None
        if populator is not None:
            populator.close()
        return populator is not None

    def unpark(self) -> None:
        self.machine.unpark()
        if self._was_populating:
            carefully(self.start_populating)

    def on_new_pid(self) -> None:
        """This VMM goes on in another process than before.  Raises nothing: the guest waits."""
        if self.pidfile is not None:
            carefully(self.pidfile.rewrite)
        carefully(self.lock_ram)
        for chardev in self.chardevs.values():
            carefully(chardev.expect_another)

    def lock_ram(self) -> None:
        """The source of a cpr-transfer must not run the guest: no exec keeps the lock on its RAM,
        as the descriptors of the image before are closed.

        Again in a moment while another image of this VM has it, which is about to end.
        """
        from cpr.migration.holder import take_guest

        state = self.machine.runstate.current
        if state in (runstate.POSTMIGRATE, runstate.INMIGRATE):  # it is not this VMM's
            return
        hold(self.machine.blocks)
        try:
            take_guest(self.machine.blocks)
        except CommandError:
            self.loop.call_later(LOCK_NS, self.lock_ram)

    def hold_commands(self, on: bool) -> None:
        for _, monitor in self.monitors:
            monitor.hold(on)

    def connections(self) -> dict[str, Kept]:
        from cpr.vmm.connections import save

        return save(self, late=False)

    def keep_connections(self, fds: PreservedFds) -> None:
        from cpr.migration.connections import keep
        from cpr.vmm.connections import save

        kept = save(self, late=True)
        if kept:
            keep(fds, kept)
            self._going = kept

    def take_connections_back(self, fds: PreservedFds) -> None:
        from cpr.migration.connections import take_back
        from cpr.vmm.connections import CHARDEV

        going, self._going = self._going, {}
        if take_back(fds, going):
            for label, chardev in self.chardevs.items():
                if f"{CHARDEV}{label}" in going:
                    chardev.start_over()

    def _staying(self) -> list[Chardev]:
        """The chardevs whose connections do not go over the update."""
        from cpr.vmm.connections import CHARDEV

        return [
            chardev
            for label, chardev in self.chardevs.items()
            if f"{CHARDEV}{label}" not in self._going
        ]

    def on_update(self) -> None:
        from cpr.live import notify

        for chardev in self.chardevs.values():
            chardev.on_update()
        notify.reloading()

    def on_update_failed(self, reason: str) -> None:
        from cpr.live import notify

        notify.failed()
        notify.status(f"the update failed: {reason}")

    def exec_fds(self) -> list[int]:
        return [fd for chardev in self._staying() for fd in chardev.exec_fds()]

    def interrupted(self) -> bool:
        return self.signal_has_come()

    def reopen(self) -> None:
        staying = self._staying()
        for chardev in staying:
            carefully(chardev.forget_exec_fds)
        for chardev in staying:
            carefully(chardev.reopen)

    def create_frontends(self, after_exec: bool, kept: dict[str, Kept] | None = None) -> None:
        """Makes the chardevs, connects the devices to them, and starts the monitors.

        `kept` is what goes on of the old image's connections, and becomes this VMM's; what there
        is no place for here is closed.  Raises ConfigError where a chardev cannot be made; but
        after an exec, where a guest runs already, that is only reported and the guest goes on
        without it.
        """
        from cpr.chardev.base import create
        from cpr.vmm.connections import Arrived

        arrived = Arrived(self.config, kept or {})
        for config in self.config.chardevs:
            try:
                point("chardev")
                connection = arrived.chardevs.get(config.id)
                self.chardevs[config.id] = create(config, self.loop, after_exec, connection)
            except CprError as error:
                text = f"{config.location}: {error}"
                if not after_exec:
                    raise ConfigError(text) from None
                error_report(text)
            except Exception as error:
                if not after_exec:
                    raise
                exception_report(error)
        for device, chardev_id in self.machine.frontends:
            chardev = self.chardevs.get(chardev_id) if chardev_id else None
            if chardev is not None:
                chardev.input_lock = self.machine.lock  # a stop comes before or after a byte
            device.attach(chardev)
        if arrived.passed is not None:
            self.passed_fds.adopt(arrived.passed)
        self._create_monitors(arrived)
        self.events.forget()

    def _create_monitors(self, arrived: Arrived) -> None:
        for config in self.config.monitors:
            chardev = self.chardevs.get(config.chardev)
            if chardev is None:
                continue
            kept = arrived.monitor(chardev)
            try:
                monitor = self._create_monitor(config, chardev, kept)
            except Exception as error:
                if kept is None:
                    raise
                exception_report(error)  # another version's: a new monitor is better than none
                monitor = self._create_monitor(config, chardev, None)
            self.monitors.append((config, monitor))

    def _create_monitor(
        self, config: MonitorConfig, chardev: Chardev, kept: dict[str, Any] | None
    ) -> Any:
        from cpr.monitor.hmp import HmpMonitor
        from cpr.monitor.qmp import QmpMonitor

        if config.mode == "control":
            return QmpMonitor(chardev, self, config.pretty, kept)
        return HmpMonitor(chardev, self, kept)

    def start_populating(self) -> None:
        """Populates RAM that prealloc=on asks for, while the guest runs already."""
        from cpr.vmm.populate import Populator

        self.populator = Populator(self.machine.blocks)

    def reap(self, untold: bool) -> None:
        """Reaps the children that earlier images of this process have left, when they end.

        `untold`: a guard among them has not been told by the token that this image has the guest.
        """
        for pid in guard.children():
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                continue
            if untold and self._maps_ram(pid):
                self._untold.add(pid)
            self._call_at_end(pidfd, partial(self._reap, pid))

    def _maps_ram(self, pid: int) -> bool:
        """Whether a process has the guest's RAM, as a guard has; what a script leaves has not."""
        inodes = {str(os.fstat(each.fd).st_ino) for each in self.machine.blocks if each.fd >= 0}
        try:
            with open(f"/proc/{pid}/maps") as file:
                return any(line.split()[4] in inodes for line in file)
        except OSError:
            return True

    def _reap(self, pid: int) -> None:
        self._untold.discard(pid)
        guard.reap(pid)

    def has_untold_guard(self) -> bool:
        return bool(self._untold)

    def _call_at_end(self, pidfd: int, reap: Callable[[], None]) -> None:
        """The pidfd becomes this object's."""

        def on_end(events: int) -> None:
            self.loop.unwatch(pidfd)
            os.close(pidfd)
            reap()

        self.loop.watch(pidfd, READ, on_end)

    def reap_child(self, pid: int, reap: Callable[[], None]) -> None:
        """channel.reap_later; where there is no descriptor the child stays a zombie."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return
        self.loop.call_soon(lambda: self._call_at_end(pidfd, reap))

    def close(self) -> None:
        """Stops the guest and frees everything, the terminal's settings included."""
        from cpr.live import notify

        for step in (
            notify.stopping,
            lambda: self.migration.close(self.exit_status),
            self._end_populator,
            self.machine.pause_vcpus,
            self._close_chardevs,
            self.passed_fds.close_all,
            self.machine.close,
        ):
            carefully(step)
        if self.pidfile is not None:
            self.pidfile.remove()

    def _close_chardevs(self) -> None:
        for chardev in self.chardevs.values():
            chardev.flush(FLUSH_NS)
            carefully(chardev.close)
