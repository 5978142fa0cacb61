"""One VMM process: builds the machine, brings the guest up, then serves its monitors.

A new image of an update checks and builds everything before it has the guest; chardevs and
monitors, and all that they import, come when the guest runs again.
"""

from __future__ import annotations

import gc
import os
import sys
from functools import partial

from cpr import pc, phases
from cpr.config import parse_command_line
from cpr.constants import STDERR
from cpr.errors import ConfigError, CprError, MigrationError
from cpr.events import EventBus
from cpr.faults import point
from cpr.live.new_image import find_predecessor
from cpr.live.transaction import EARLY, LATE
from cpr.mainloop import MainLoop
from cpr.migration import holder
from cpr.migration.address import connects_in_background
from cpr.migration.incoming import DEFER, Sources
from cpr.migration.migration import Migration
from cpr.migration.mode import EXEC, KeepsRam
from cpr.migration.run_with import RunWith
from cpr.migration.statistics import UpdateTimes
from cpr.monitor.passed_fds import PassedFds
from cpr.phases import mark
from cpr.ram_backend import claim, hold
from cpr.report import carefully, error_report, exhausted, info_report, output, warn_report
from cpr.state.cpr_state import STATE_NAME
from cpr.state.fds import PreservedFds
from cpr.vmm import daemon
from cpr.vmm.preload import preload
from cpr.vmm.vmm import Vmm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.config import Config
    from cpr.live.new_image import Predecessor
    from cpr.migration.arrival import Arrival
    from cpr.migration.cpr_transfer import CprListener
    from cpr.state.connections import Kept

SWITCH_INTERVAL = 0.00002
"""How long, in s, a vCPU that exits to a device waits for another thread's Python at most."""


def run_vmm(arguments: list[str]) -> int:
    """Runs a VMM until the guest or the user ends it; returns the exit status.

    Raises CprError where it cannot start; where it is the new image of an update, the old one then
    goes on, under this PID if that can be.
    """
    mark("config")
    sys.setswitchinterval(SWITCH_INTERVAL)
    predecessor = find_predecessor()
    try:
        return _run(arguments, predecessor)
    except Exception as error:
        if predecessor is not None:
            predecessor.refuse(exhausted(error) or str(error) or type(error).__name__)
        raise


def _run(arguments: list[str], predecessor: Predecessor | None) -> int:
    signals = daemon.Signals(takes_over=predecessor is not None)
    config = parse_command_line(arguments)
    if config.action is not None:
        output(config.action_text)
        return 0
    for warning in config.warnings:
        warn_report(warning)
    fds = PreservedFds()
    after_exec = predecessor is not None or STATE_NAME in os.environ
    run_with = RunWith(config.run_with, after_exec)
    ready = None
    if predecessor is not None and predecessor.mode != LATE:
        vmm = _arrive(config, fds, predecessor, run_with)
    else:
        if config.daemonize and not after_exec:
            ready = daemon.daemonize()
        vmm = _start(config, fds, predecessor, run_with)
    fds.incoming = False
    if after_exec:
        carefully(lambda: vmm.reap(untold=predecessor is None))
    signals.attach(vmm)
    if predecessor is None or predecessor.committed:
        carefully(lambda: _take_pidfile(vmm))
    if ready is not None:
        ready()
    if predecessor is None:
        from cpr.live import notify

        notify.started(pid_changed=ready is not None)
    vmm.loop.run()
    if predecessor is not None and not predecessor.committed:
        if not vmm.machine.ended:  # the load has failed: all that is here is the old image's
            os._exit(vmm.exit_status or 1)
        carefully(lambda: _take_pidfile(vmm))
        predecessor.end()
    vmm.close()
    return vmm.exit_status


def _start(
    config: Config, fds: PreservedFds, predecessor: Predecessor | None, run_with: RunWith
) -> Vmm:
    """A new guest, one that comes in, or the one of a late update."""
    sources = Sources(config.incoming)
    after_exec = fds.load_from_environment()
    listener = None
    if sources.cpr is not None:
        listener = _receive(sources.cpr, fds, after_exec)
    vmm = _create(config, fds)
    vmm.migration.incoming_side.listener = listener
    if listener is not None:
        holder.hold(vmm.machine.blocks)
    vmm.migration.incoming_side.on_running = vmm.lock_ram
    if after_exec:
        _bring_over(vmm, fds, sources, predecessor, run_with)
    else:
        try:
            _bring_up(vmm, sources, run_with)
        except BaseException:
            carefully(vmm.close)
            raise
    carefully(vmm.start_populating)
    return vmm


def _bring_over(
    vmm: Vmm,
    fds: PreservedFds,
    sources: Sources,
    predecessor: Predecessor | None,
    run_with: RunWith,
) -> None:
    """The guest of a late update: what it waits for is short."""
    incoming = vmm.migration.incoming_side
    if predecessor is not None:
        incoming.hold, incoming.refuse = predecessor.hold, predecessor.refuse
        incoming.is_late = True
        incoming.hold(sources.main == DEFER)
        incoming.commit = lambda: _commit(vmm, predecessor)
    _confine(vmm, run_with)
    hold(vmm.machine.blocks)
    if _loads_at_once(sources.main):
        _load(vmm, sources)
        carefully(lambda: vmm.create_frontends(True, _kept(fds)))
        carefully(lambda: _ready_for_updates(vmm))
    else:
        incoming.on_running = lambda: _go_on_deferred(vmm)
        vmm.create_frontends(True, _kept(fds))
        if (
            predecessor is not None and not vmm.monitors
        ):  # the guest stands still until one is told migrate-incoming
            raise ConfigError("-incoming defer: there is no monitor; give this VMM one")
        _boot(vmm, sources)


def _go_on_deferred(vmm: Vmm) -> None:
    """After migrate-incoming; what comes after the start of any other VMM has been by then."""
    for step in (lambda: _take_pidfile(vmm), vmm.lock_ram, lambda: _ready_for_updates(vmm)):
        carefully(step)


def _ready_for_updates(vmm: Vmm) -> None:
    """Has read what a later update must not read any more, see `preload`."""
    preload()
    carefully(vmm.migration.files.record)


def _bring_up(vmm: Vmm, sources: Sources, run_with: RunWith) -> None:
    """A guest that nobody waits for yet."""
    _claim(vmm, sources, run_with)
    vmm.migration.incoming_side.claims = True
    vmm.create_frontends(False)
    _ready_for_updates(vmm)
    settle = partial(_confine, vmm, run_with)  # the last step before the guest can run
    if _loads_at_once(sources.main):
        vmm.migration.incoming_side.commit = settle
        _load(vmm, sources)
    else:
        _boot(vmm, sources, settle)


def _loads_at_once(source: dict | str | None) -> bool:
    return isinstance(source, dict) and not connects_in_background(source)


def _claim(vmm: Vmm, sources: Sources, run_with: RunWith) -> None:
    """What only one VMM can have, before it takes anything away from another one that has it: the
    PID file, and a file that is its guest's RAM.  Raises CprError."""
    if vmm.config.pidfile:
        vmm.pidfile = daemon.Pidfile(vmm.config.pidfile)
        run_with.owns(vmm.pidfile.fileno())
    if sources.main is None:
        claim(vmm.machine.blocks)


def _commit(vmm: Vmm, predecessor: Predecessor) -> None:
    """The guest of a late update is loaded: it is this VMM's from here on."""
    predecessor.commit()
    incoming = vmm.migration.incoming_side
    then = incoming.on_running

    def on_running() -> None:
        for step in (
            _say_up,
            lambda: _end_update(vmm, predecessor),
            then,
        ):
            carefully(step)

    incoming.on_running = on_running


def _say_up() -> None:
    """The PID has the guest: before the guard, which the service's manager watches so far, ends."""
    from cpr.live import notify

    notify.started(pid_changed=True)


def _end_update(vmm: Vmm, predecessor: Predecessor) -> None:
    """The guest runs: says what that took, and gives up what the update needed."""
    from cpr.live import notify

    page = predecessor.page.struct
    times = UpdateTimes(
        LATE if predecessor.mode == LATE else EARLY,
        int(page.began_ns),
        int(page.exec_ns),
        int(page.stopped_ns),
        phases.times,
    )
    vmm.migration.update_times = times
    point("end")
    predecessor.close()
    carefully(vmm.lock_ram)
    notify.status(times.text())
    if not os.isatty(STDERR):  # a user at the terminal asks `info migrate`
        info_report(times.text())


def _arrive(config: Config, fds: PreservedFds, predecessor: Predecessor, run_with: RunWith) -> Vmm:
    """The guest of an early update, which runs elsewhere until all is ready here."""
    from cpr.migration import connections, savevm
    from cpr.migration.arrival import Arrival
    from cpr.vmm.populate import populate_before

    arrival = Arrival(predecessor)
    arrival.receive_state(fds)
    vmm = _create(config, fds)
    arrival.check(vmm.machine)
    _confine(vmm, run_with)
    if arrival.rehearses:
        arrival.rehearsed()
    hold(vmm.machine.blocks)
    incoming = vmm.migration.incoming_side
    incoming.expect(config.start_paused)
    incoming.commit = arrival.commit
    incoming.on_running = _say_up
    _ready_for_updates(vmm)
    mark("populate")
    populate_before(vmm.machine.blocks, bool(arrival.placement.guest_cpus))
    gc.disable()  # not in the hand-over, for which the guest stands still
    savevm.warm_up(vmm.machine, KeepsRam(EXEC))
    arrival.load_sections(vmm.machine)
    gc.freeze()
    arrival.load_again(vmm.machine)
    mark("ready")
    incoming.take(arrival.receive_guest(fds))
    kept: dict[str, Kept] = {}
    for step in (
        arrival.placement.keep_away,
        lambda: kept.update(connections.receive(predecessor)),
        lambda: _end_update(vmm, predecessor),
        lambda: _report(vmm, arrival),
        lambda: vmm.create_frontends(True, kept),
        lambda: arrival.placement.release(vmm.machine.threads),
        lambda: arrival.placement.give_back(vmm.machine.threads),
        vmm.start_populating,  # what there was no time for
    ):
        carefully(step)
    gc.enable()
    return vmm


def _kept(fds: PreservedFds) -> dict[str, Kept]:
    """The connections that a late update keeps."""
    from cpr.migration import connections

    try:
        return connections.take(fds)
    except CprError as error:
        error_report(error)
        return {}


def _report(vmm: Vmm, arrival: Arrival) -> None:
    """Says what has become of the update."""
    if arrival.old_pid not in (0, os.getpid()):  # whoever knows the VM by that finds another one
        warn_report(
            f"the guest is in PID {os.getpid()}, which the program in PID {arrival.old_pid} has "
            "started: in a script, exec gives it that PID"
        )
    if arrival.failure:
        from cpr.live import notify

        notify.status(f"the update failed: {arrival.failure}")
        vmm.migration.state.error = arrival.failure
        vmm.migration.state.set("failed")
        error_report(
            f"the update failed: {arrival.failure}; the guest goes on in the old VMM, PID "
            f"{os.getpid()}"
        )


def _create(config: Config, fds: PreservedFds) -> Vmm:
    loop = MainLoop()
    events = EventBus()
    passed_fds = PassedFds()
    machine = pc.build(config, fds, loop, events)
    migration = Migration(machine, fds, loop, events, passed_fds)
    migration.state.apply_globals(config.globals)
    return Vmm(config, machine, migration, loop, passed_fds)


def _confine(vmm: Vmm, run_with: RunWith) -> None:
    """-name process=, -run-with and -sandbox, which may forbid the others.  Raises CprError."""
    config = vmm.config
    if config.process_name:
        with open("/proc/self/comm", "w") as file:
            file.write(config.process_name)
    run_with.apply(vmm.machine)
    if config.sandbox.get("enable"):
        from cpr.uapi import seccomp

        seccomp.apply(config.sandbox, run_with.after_exec)


def _take_pidfile(vmm: Vmm) -> None:
    """That of a guest that is there already.  Raises ConfigError."""
    if vmm.config.pidfile and vmm.pidfile is None:
        vmm.pidfile = daemon.Pidfile(vmm.config.pidfile)


def _load(vmm: Vmm, sources: Sources) -> None:
    """Takes over the guest from the main channel; it may run when this returns."""
    source = sources.main
    assert isinstance(source, dict)
    incoming = vmm.migration.incoming_side
    incoming.expect(vmm.config.start_paused)
    try:
        incoming.load_now(source)
    except ConfigError as error:
        raise ConfigError(f"-incoming {sources.option}: {error}") from None
    finally:
        carefully(lambda: _remove_directory(source))


def _remove_directory(source: dict) -> None:
    from cpr.migration.cpr_exec import remove_own_directory  # not before: a late guest stood still

    remove_own_directory(source)


def _receive(address: dict, fds: PreservedFds, after_exec: bool) -> CprListener | None:
    """Waits for the CPR state of a cpr-transfer; nothing is made before it has come."""
    if after_exec:
        warn_report("ignoring cpr channel for migration mode cpr-exec")
        return None
    from cpr.migration.cpr_transfer import CprListener

    listener = CprListener(address)
    fds.take_over(listener.receive())
    fds.incoming = True
    return listener


def _boot(vmm: Vmm, sources: Sources, settle: Callable[[], None] = lambda: None) -> None:
    """A new guest, or, with -incoming, one that waits for its state."""
    incoming = vmm.migration.incoming_side
    source = sources.main
    if source is not None:
        incoming.expect(vmm.config.start_paused)
        if isinstance(source, dict):
            try:
                incoming.start(source, True, settle)
            except MigrationError as error:
                raise ConfigError(f"-incoming {sources.option}: {error}") from None
        else:
            settle()
        return
    incoming.commit()
    vmm.machine.load_boot_image()
    settle()
    if not vmm.config.start_paused:
        vmm.machine.cont()
