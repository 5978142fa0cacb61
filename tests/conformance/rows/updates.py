"""Part 3: an update as a QMP client sees it, from the command to the new image and back."""

from __future__ import annotations

from typing import Any

from ..match import ANY, like
from ..row import Row, Step, step
from ..steps import (
    DEFER,
    EXEC,
    FILE,
    INCOMING,
    STARTED,
    Lab,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    exits,
    expect,
    guest,
    hmp,
    migration,
    migration_comes_to,
    new_command,
    no_events,
    parameters,
    qmp,
    reconnect,
    refused,
    running,
    see,
    status,
    stderr,
    still,
    survives,
    talk,
    update,
)
from .failed_exec import MISSING, NO_SUCH_FILE
from .parameters import DEFAULTS, LINES, capability_list

RAM_KEYS: dict[str, Any] = {
    "total": 0,
    "postcopy-requests": 0,
    "dirty-sync-count": 2,
    "multifd-bytes": 0,
    "pages-per-second": 0,
    "downtime-bytes": int,
    "page-size": 4096,
    "remaining": 0,
    "postcopy-bytes": 0,
    "mbps": ANY,
    "transferred": int,
    "dirty-sync-missed-zero-copy": 0,
    "precopy-bytes": 0,
    "duplicate": 0,
    "dirty-pages-rate": 0,
    "normal-bytes": 0,
    "normal": 0,
}
PRE_SWITCHOVER = {
    "status": "pre-switchover",
    "expected-downtime": int,
    "remaining": 0,
    "setup-time": int,
    "total-time": int,
    "ram": RAM_KEYS,
}
PRE_SWITCHOVER_LINES = [
    "Status: \t\tpre-switchover",
    like(r"Time \(ms\): \t\ttotal=\d+, setup=\d+, exp_down=\d+"),
    "Remaining: \t\t0 B",
    "RAM info:",
    like(r"  Throughput \(Mbps\): \t[\d.]+"),
    "  Sizes: \t\tpagesize=4 KiB, total=0 B",
    like(r"  Transfers: \t\ttransferred=[\d.]+ K?i?B, remain=0 B"),
    "    Channels: \t\tprecopy=0 B, multifd=0 B, postcopy=0 B",
    "    Page Types: \tnormal=0, zero=0",
    "  Page Rates (pps): \ttransfer=0",
    "  Others: \t\tdirty_syncs=2",
]
GLOBALS = [
    "Globals:",
    "  store-global-state: on",
    "  only-migratable: off",
    "  send-configuration: on",
    "  send-section-footer: on",
    "  send-switchover-start: on",
    "  clear-bitmap-shift: 18",
]
IN_PROGRESS = "There's a migration process in progress"


def nothing_carried_over() -> list[Step]:
    """The new image has the parameters and capabilities of a new start."""
    return [
        qmp("query-migrate-parameters", None, DEFAULTS),
        capability_list(),
        hmp("info migrate", "Status: \t\tcompleted"),
        hmp("info status", "VM status: running"),
        hmp("info migrate_parameters", *LINES),
    ]


@step
def command_line_is_new(lab: Lab) -> None:
    """The new image's command line is cpr-exec-command, and it is the same process."""
    expected = [*lab.vm.prefix, *lab.vm.options, *lab.words(INCOMING)]
    expect("command line", expected, lab.vm.process.words("cmdline"), lab.names)


def loaded() -> tuple[str, ...]:
    """The messages of a migrate-incoming of a guest that ran."""
    return ("setup", "{}", "active", "RESUME", "completed")


def at_pre_switchover(command: list[str] | None = None) -> list[Step]:
    """A guest that an update has stopped and not yet saved."""
    return [
        boot(),
        counting(),
        capabilities("events", "pause-before-switchover"),
        new_command(DEFER) if command is None else [],
        parameters(mode="cpr-exec", cpr_exec_command=command) if command else [],
        talk("migrate", {"uri": FILE}, *STARTED[:-1], "pre-switchover"),
    ]


@step
def hmp_ends(lab: Lab, line: str) -> None:
    """An HMP command given through QMP that prints nothing, and the exec that follows."""
    lab.vm.qmp.send("human-monitor-command", {"command-line": lab.fill(line)})
    see(lab, ("STOP", '""', "EOF"))


@step
def greeting_names_the_version(lab: Lab) -> None:
    """The greeting has the version and the capability oob; negotiation is answered with {}."""
    version = {"qemu": {"micro": int, "minor": int, "major": int}, "package": str}
    expected = {"QMP": {"version": version, "capabilities": ["oob"]}}
    expect("greeting", expected, lab.vm.qmp.greeting, lab.names)
    expect("qmp_capabilities", {"return": {}}, lab.vm.qmp.negotiated, lab.names)


ROWS = [
    Row(
        "update",
        "3: QMP, running guest, -incoming file:",
        boot(),
        counting(),
        migration({}),
        capabilities("events"),
        new_command(),
        status("running"),
        migration({}),
        talk("migrate", {"uri": FILE}, *EXEC),
        connect(),
        command_line_is_new(),
        survives(),
        nothing_carried_over(),
    ),
    Row(
        "update-defer",
        "3: QMP, -incoming defer",
        boot(),
        update(more=DEFER),
        status("inmigrate"),
        migration({}),
        still(),
        capabilities("events"),
        talk("migrate-incoming", {"uri": FILE}, *loaded()),
        survives(),
        capability_list("events"),
    ),
    Row(
        "update-without-events",
        "3: QMP, running guest, -incoming file:",
        boot(),
        counting(),
        new_command(),
        talk("migrate", {"uri": FILE}, "STOP", "{}", "EOF"),
        connect(),
        survives(),
    ),
    Row(
        "update-twice",
        "1: order: gen 2",
        boot(),
        update(),
        survives(),
        update(),
        survives(),
        update(uri="file:$dir/other", more="-incoming file:$dir/other"),
        survives(),
    ),
    Row(
        "update-paused",
        "4: Paused guest: no STOP event",
        boot(),
        counting(),
        talk("stop", None, "STOP", "{}"),
        hmp("info status", "VM status: paused"),
        capabilities("events"),
        new_command(DEFER),
        talk(
            "migrate",
            {"uri": FILE},
            "setup",
            "{}",
            "active",
            "pass:2",
            "device",
            "completed",
            "EOF",
        ),
        connect(),
        capabilities("events"),
        talk("migrate-incoming", {"uri": FILE}, "setup", "{}", "active", "completed"),
        status("paused"),
        no_events(),
        still(),
        talk("cont", None, "RESUME", "{}"),
        status("running"),
        counting(),
    ),
    Row(
        "update-prelaunch",
        "4: Paused guest: no STOP event: prelaunch",
        boot(guest("-S")),
        status("prelaunch"),
        hmp("info status", "VM status: paused (prelaunch)"),
        new_command(options=guest()),
        qmp("migrate", {"uri": FILE}, {}),
        reconnect(),
        comes_to("prelaunch"),
        migration({"status": "completed"}),
        talk("cont", None, "RESUME", "{}"),
        counting(),
    ),
    Row(
        "update-new-side-S",
        "4: new side with -S",
        boot(),
        update(more=f"-S {INCOMING}"),
        comes_to("paused"),
        still(),
        talk("cont", None, "RESUME", "{}"),
        counting(),
    ),
    Row(
        "update-by-hmp",
        "3: HMP on a pty: migrate -d",
        boot(),
        counting(),
        new_command(),
        hmp("info migrate"),
        hmp_ends(f"migrate -d {FILE}"),
        connect(),
        survives(),
    ),
    Row(
        "pre-switchover",
        "4: pause-before-switchover",
        at_pre_switchover(),
        status("finish-migrate"),
        hmp("info status", "VM status: paused (finish-migrate)"),
        still(),
        migration(PRE_SWITCHOVER),
        hmp("info migrate", *PRE_SWITCHOVER_LINES),
        no_events(),
        talk(
            "migrate-continue",
            {"state": "pre-switchover"},
            "{}",
            "device",
            "completed",
            "EOF",
        ),
        connect(),
        comes_to("inmigrate"),
        qmp("migrate-incoming", {"uri": FILE}, {}),
        survives(),
    ),
    Row(
        "pre-switchover-second-migrate",
        "4: second migrate while one runs",
        at_pre_switchover(),
        refused("migrate", {"uri": FILE}, IN_PROGRESS),
        refused(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "multifd", "state": True}]},
            IN_PROGRESS,
        ),
        parameters(downtime_limit=400),
        migration(PRE_SWITCHOVER),
    ),
    Row(
        "pre-switchover-cont-stop",
        "4: cont during it",
        at_pre_switchover(),
        refused("cont", None, "Migration is not finalized yet"),
        qmp("stop", None, {}),
        status("finish-migrate"),
        no_events(),
    ),
    Row(
        "pre-switchover-wrong-continue",
        "4: pause-before-switchover",
        at_pre_switchover(),
        refused(
            "migrate-continue",
            {"state": "device"},
            "Migration not in expected state: pre-switchover",
        ),
        refused(
            "migrate-continue",
            {"state": "bogus"},
            "Parameter 'state' does not accept value 'bogus'",
        ),
        status("finish-migrate"),
    ),
    Row(
        "pre-switchover-failed-exec",
        "4: Failed execvp",
        at_pre_switchover([MISSING]),
        talk(
            "migrate-continue",
            {"state": "pre-switchover"},
            "{}",
            "device",
            "completed",
            "failed",
            "RESUME",
        ),
        migration({"status": "failed", "error-desc": NO_SUCH_FILE}),
        running(),
    ),
    Row(
        "cancel",
        "4: migrate_cancel at pre-switchover",
        at_pre_switchover(),
        talk("migrate_cancel", None, "cancelling", "{}", "RESUME", "cancelled"),
        status("running"),
        migration({"status": "cancelled", "error-desc": "Switchover is interrupted"}),
        hmp("info migrate", "Status: \t\tcancelled"),
        stderr("Switchover is interrupted"),
        counting(),
    ),
    Row(
        "cancel-then-update",
        "4: migrate_cancel at pre-switchover",
        at_pre_switchover(),
        talk("migrate_cancel", None, "cancelling", "{}", "RESUME", "cancelled"),
        capabilities("pause-before-switchover", state=False),
        update(),
        comes_to("running"),
        counting(),
    ),
    Row(
        "cancel-idle",
        "4: migrate_cancel idle",
        boot(),
        capabilities("events"),
        talk("migrate_cancel", None, "{}"),
        migration({}),
        running(),
    ),
    Row(
        "continue-idle",
        "4: pause-before-switchover",
        boot(),
        refused(
            "migrate-continue",
            {"state": "pre-switchover"},
            "Migration not in expected state: none",
        ),
    ),
    Row(
        "info-migrate-all",
        "3: HMP: info migrate -a",
        boot(),
        hmp("info migrate"),
        hmp("info migrate -a", *GLOBALS),
        parameters(mode="cpr-exec", cpr_exec_command=[MISSING]),
        qmp("migrate", {"uri": FILE}, {}),
        comes_to("running"),
        migration_comes_to({"status": "failed", "error-desc": NO_SUCH_FILE}),
        hmp("info migrate -a", f"Status: \t\tfailed ({NO_SUCH_FILE})", *GLOBALS),
    ),
    Row(
        "only-migratable",
        "4: -only-migratable",
        boot(guest("-only-migratable")),
        update(),
        survives(),
    ),
    Row(
        "no-aux-ram-share",
        "4: no aux-ram-share but ram0 shared",
        boot(guest(machine="-machine pc,memory-backend=ram0")),
        update(),
        survives(),
    ),
    Row(
        "greeting",
        "3: QMP, running guest, -incoming file:",
        boot(),
        greeting_names_the_version(),
    ),
    Row(
        "quit",
        "5: quit → SHUTDOWN",
        boot(),
        talk("quit", None, "SHUTDOWN host-qmp-quit", "{}", "EOF"),
        exits(0),
    ),
]
