"""Part 4: an update that waits before its switchover, is cancelled there or goes on."""

from __future__ import annotations

from typing import Any

from ..match import ANY, like
from ..row import Row, Steps
from ..steps import (
    DEFER,
    FILE,
    STARTED,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    events,
    hmp,
    migration,
    new_command,
    no_events,
    parameters,
    qmp,
    refused,
    running,
    status,
    stderr,
    still,
    survives,
    talk,
    update,
)
from .failed_exec import MISSING, NO_SUCH_FILE

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

# The migration's thread goes on at once: its events come before or after the reply.
CONTINUE = qmp("migrate-continue", {"state": "pre-switchover"}, {})
CANCEL = [qmp("migrate_cancel", None, {}), events("cancelling", "RESUME", "cancelled")]
IN_PROGRESS = "There's a migration process in progress"


def at_pre_switchover(command: list[str] | None = None) -> Steps:
    """A guest that an update has stopped and not yet saved."""
    return [
        boot(),
        counting(),
        capabilities("events", "pause-before-switchover"),
        new_command(DEFER) if command is None else [],
        parameters(mode="cpr-exec", cpr_exec_command=command) if command else [],
        talk("migrate", {"uri": FILE}, *STARTED[:-1], "pre-switchover"),
    ]


ROWS = [
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
        CONTINUE,
        events("device", "completed", "EOF"),
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
        CONTINUE,
        events("device", "completed", "failed", "RESUME"),
        migration({"status": "failed", "error-desc": NO_SUCH_FILE}),
        running(),
    ),
    Row(
        "cancel",
        "4: migrate_cancel at pre-switchover",
        at_pre_switchover(),
        CANCEL,
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
        CANCEL,
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
]
