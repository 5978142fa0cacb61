"""One VMM process: builds the machine, brings the guest up, then serves its monitors.

After an exec the guest resumes first: chardevs and monitors, and all that they import, come when
it runs again.
"""

from __future__ import annotations

import sys

from cpr import pc
from cpr.config import parse_command_line
from cpr.errors import ConfigError, CprError, MigrationError
from cpr.events import EventBus
from cpr.mainloop import MainLoop
from cpr.migration import cpr_exec
from cpr.migration.address import connects_in_background
from cpr.migration.incoming import Sources
from cpr.migration.migration import Migration
from cpr.monitor.passed_fds import PassedFds
from cpr.phases import mark
from cpr.state.fds import PreservedFds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.chardev.base import Chardev
    from cpr.config import Config
    from cpr.machine import Machine
    from cpr.migration.cpr_transfer import CprListener
    from cpr.vmm.populate import Populator

FLUSH_NS = 200_000_000


class Vmm:
    """What a monitor command gets: the parts of this process, by name."""

    def __init__(
        self,
        config: Config,
        machine: Machine,
        migration: Migration,
        loop: MainLoop,
        passed_fds: PassedFds,
    ) -> None:
        self.config = config
        self.machine = machine
        self.migration = migration
        self.loop = loop
        self.events = machine.events
        self.chardevs: dict[str, Chardev] = {}
        self.monitors: list[Any] = []
        self.passed_fds = passed_fds
        self.populator: Populator | None = None
        self.exit_status = 0
        machine.on_exit = self._exit
        migration.before_exec = self._before_exec

    def quit(self, reason: str) -> None:
        """Ends the process from the host's side, with a SHUTDOWN event."""
        self.machine.shutdown(False, reason)

    def _exit(self, status: int) -> None:
        self.exit_status = status
        self.loop.stop()

    def _before_exec(self) -> None:
        for chardev in self.chardevs.values():
            chardev.flush(FLUSH_NS)

    def create_frontends(self, after_exec: bool) -> None:
        """Makes the chardevs, connects the devices to them, and starts the monitors.

        Raises ConfigError where a chardev cannot be had; but after an exec, where a guest runs
        already, that is only reported and the guest goes on without it.
        """
        from cpr.chardev.base import create

        for config in self.config.chardevs:
            try:
                self.chardevs[config.id] = create(config, self.loop, after_exec)
            except CprError as error:
                text = f"{config.location}: {error}"
                if not after_exec:
                    raise ConfigError(text) from None
                print(f"cpr-vmm: {text}", file=sys.stderr)
        for device, chardev_id in self.machine.frontends:
            device.attach(self.chardevs.get(chardev_id) if chardev_id else None)
        self._create_monitors()

    def _create_monitors(self) -> None:
        from cpr.monitor.hmp import HmpMonitor
        from cpr.monitor.qmp import QmpMonitor

        for config in self.config.monitors:
            chardev = self.chardevs.get(config.chardev)
            if chardev is None:
                continue
            if config.mode == "control":
                self.monitors.append(QmpMonitor(chardev, self, config.pretty))
            else:
                self.monitors.append(HmpMonitor(chardev, self))

    def start_populating(self) -> None:
        """Populates RAM that prealloc=on asks for, while the guest runs already."""
        from cpr.vmm.populate import Populator

        self.populator = Populator(self.machine.blocks)

    def close(self) -> None:
        """Stops the guest and frees everything, the terminal's settings included."""
        self.migration.close()
        if self.populator is not None:
            self.populator.close()
        self.machine.pause_vcpus()
        for chardev in self.chardevs.values():
            chardev.flush(FLUSH_NS)
            chardev.close()
        self.passed_fds.close_all()
        self.machine.close()


def run_vmm(arguments: list[str]) -> int:
    """Runs a VMM until the guest or the user ends it; returns the exit status.

    Raises CprError where it cannot start.
    """
    mark("config")
    config = parse_command_line(arguments)
    if config.action is not None:
        print(config.action_text, end="")
        return 0
    for warning in config.warnings:
        print(f"cpr-vmm: {warning}", file=sys.stderr)
    sources = Sources(config.incoming)
    fds = PreservedFds()
    after_exec = fds.load_from_environment()
    ready = None
    if config.daemonize and not after_exec:
        from cpr.vmm.daemon import daemonize

        ready = daemonize()
    listener = None
    if sources.cpr is not None:
        listener = _receive(sources.cpr, fds, after_exec)
    vmm = _create(config, fds)
    vmm.migration.incoming_side.listener = listener
    _confine(config)
    if isinstance(sources.main, dict) and not connects_in_background(sources.main):
        _load(vmm, sources.main, sources.option)
        vmm.create_frontends(after_exec)
    else:
        vmm.create_frontends(after_exec)
        _boot(vmm, sources.main, sources.option)
    vmm.start_populating()
    fds.incoming = False
    from cpr.vmm import daemon

    daemon.watch_signals(vmm)
    remove_pidfile = daemon.write_pidfile(config.pidfile) if config.pidfile else None
    if ready is not None:
        ready()
    vmm.loop.run()
    vmm.close()
    if remove_pidfile is not None:
        remove_pidfile()
    return vmm.exit_status


def _create(config: Config, fds: PreservedFds) -> Vmm:
    loop = MainLoop()
    events = EventBus()
    passed_fds = PassedFds()
    machine = pc.build(config, fds, loop, events)
    migration = Migration(machine, fds, loop, events, passed_fds)
    migration.apply_globals(config.globals)
    return Vmm(config, machine, migration, loop, passed_fds)


def _confine(config: Config) -> None:
    """-sandbox and -name process=."""
    if config.process_name:
        with open("/proc/self/comm", "w") as file:
            file.write(config.process_name)
    if config.sandbox.get("enable"):
        from cpr.uapi import seccomp

        seccomp.apply(config.sandbox)


def _load(vmm: Vmm, source: dict, option: str) -> None:
    """Takes over the guest from the channel at `source`; it may run when this returns."""
    incoming = vmm.migration.incoming_side
    incoming.expect(vmm.config.start_paused)
    try:
        incoming.load_now(source)
    except ConfigError as error:
        raise ConfigError(f"-incoming {option}: {error}") from None
    finally:
        cpr_exec.remove_own_directory(source)


def _receive(address: dict, fds: PreservedFds, after_exec: bool) -> CprListener | None:
    """Waits for the CPR state of a cpr-transfer; nothing is made before it has come."""
    if after_exec:
        print("cpr-vmm: warning: ignoring cpr channel for migration mode cpr-exec", file=sys.stderr)
        return None
    from cpr.migration.cpr_transfer import CprListener

    listener = CprListener(address)
    fds.take_over(listener.receive())
    fds.incoming = True
    return listener


def _boot(vmm: Vmm, source: dict | str | None, option: str) -> None:
    """A new guest, or, with -incoming, one that waits for its state."""
    if source is not None:
        incoming = vmm.migration.incoming_side
        incoming.expect(vmm.config.start_paused)
        if isinstance(source, dict):
            try:
                incoming.start(source, exit_on_error=True)
            except MigrationError as error:
                raise ConfigError(f"-incoming {option}: {error}") from None
        return
    vmm.machine.load_boot_image()
    if not vmm.config.start_paused:
        vmm.machine.cont()
