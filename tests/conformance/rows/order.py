"""Part 4: what `migrate` looks at first, where several things would refuse it."""

from __future__ import annotations

from ..row import Row, Steps
from ..steps import (
    DEFER,
    FILE,
    boot,
    capabilities,
    comes_to,
    guest,
    migration,
    no_events,
    parameters,
    qmp,
    refused,
    status,
    talk,
)
from .migrate import INMIGRATE, NO_COMMAND, NO_RESUME, POSTMIGRATE, PRIVATE, incompatible, ready
from .with_capability import MULTI_CHANNEL


def paused_for_good() -> Steps:
    """A guest in postmigrate: a failed exec of a paused one leaves it there."""
    return [
        ready(),
        qmp("stop"),
        qmp("migrate", {"uri": FILE}),
        comes_to("postmigrate"),
        capabilities("events", state=False),
    ]


def order(id: str, *steps: Steps) -> Row:
    return Row(f"order-{id}", "4: order of checks at `migrate`", *steps)


ROWS = [
    Row(
        "migrate-in-postmigrate",
        "4: migrate in postmigrate",
        paused_for_good(),
        refused("migrate", {"uri": FILE}, POSTMIGRATE),
        status("postmigrate"),
        no_events(),
    ),
    order(
        "uri-before-transport",
        ready(),
        capabilities("multifd"),
        refused("migrate", {"uri": "bogus:x"}, "unknown migration protocol: bogus:x"),
    ),
    order(
        "transport-before-resume",
        ready(),
        capabilities("multifd"),
        refused("migrate", {"uri": FILE, "resume": True}, MULTI_CHANNEL),
    ),
    order(
        "resume-before-inmigrate",
        boot(guest(DEFER)),
        refused("migrate", {"uri": FILE, "resume": True}, NO_RESUME),
    ),
    order(
        "inmigrate-before-command",
        boot(guest(DEFER)),
        parameters(mode="cpr-exec"),
        refused("migrate", {"uri": FILE}, INMIGRATE),
    ),
    order(
        "resume-before-postmigrate",
        paused_for_good(),
        refused("migrate", {"uri": FILE, "resume": True}, NO_RESUME),
    ),
    order(
        "postmigrate-before-command",
        paused_for_good(),
        parameters(cpr_exec_command=[]),
        refused("migrate", {"uri": FILE}, POSTMIGRATE),
    ),
    order(
        "command-before-background-snapshot",
        ready(),
        capabilities("background-snapshot"),
        parameters(cpr_exec_command=[]),
        refused("migrate", {"uri": FILE}, NO_COMMAND),
    ),
    order(
        "blockers-before-background-snapshot",
        boot(guest(ram=PRIVATE)),
        parameters(mode="cpr-transfer"),
        capabilities("background-snapshot"),
        refused("migrate", {"uri": "unix:$dir/nobody.sock"}, incompatible("ram0")),
    ),
    order(
        "background-snapshot-before-channel",
        ready(),
        capabilities("background-snapshot"),
        talk(
            "migrate",
            {"uri": "file:/nonexistent/x"},
            "error: Cannot use background snapshot with CPR",
        ),
        migration({}),
    ),
]
