"""Part 3: an update as a QMP client sees it, from the command to the new image and back."""

from __future__ import annotations

from ..lab import Lab
from ..match import expect
from ..messages import follow
from ..row import Row, Steps, step
from ..steps import (
    DEFER,
    EXEC,
    FILE,
    INCOMING,
    LOADED,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    exits,
    guest,
    hmp,
    migration,
    migration_comes_to,
    new_command,
    no_events,
    parameters,
    qmp,
    reconnect,
    status,
    still,
    survives,
    talk,
    update,
)
from .failed_exec import MISSING, NO_SUCH_FILE
from .parameters import DEFAULTS, LINES, capability_list

GLOBALS = [
    "Globals:",
    "  store-global-state: on",
    "  only-migratable: off",
    "  send-configuration: on",
    "  send-section-footer: on",
    "  send-switchover-start: on",
    "  clear-bitmap-shift: 18",
]


def nothing_carried_over() -> Steps:
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
    expect("command line", expected, lab.vm.process.command_line(), lab.names)


@step
def hmp_ends(lab: Lab, line: str) -> None:
    """An HMP command given through QMP that prints nothing, and the exec that follows."""
    lab.vm.qmp.send("human-monitor-command", {"command-line": lab.fill(line)})
    follow(lab.vm.qmp, ("STOP", '""', "EOF"), lab.names)


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
        talk("migrate-incoming", {"uri": FILE}, *LOADED),
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
