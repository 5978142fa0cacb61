"""Part 4: migrate-incoming, what it refuses, and what the guest does meanwhile."""

from __future__ import annotations

from ..incoming_steps import replace, take_over
from ..row import Row, Steps
from ..steps import (
    DEFER,
    FILE,
    LOADED,
    LOADED_PAUSED,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    exits,
    hmp,
    migration,
    no_events,
    parameters,
    qmp,
    refused,
    running,
    status,
    still,
    survives,
    talk,
)
from .migrate import INMIGRATE

ALREADY = "The incoming migration has already been started"
NOT_GIVEN = "'-incoming' was not specified on the command line"
BAD_MAGIC = (
    "load of migration failed: Invalid argument: Not a migration stream, magic: 58585858 != "
    "5145564d"
)
bad_magic = replace(lambda stream: 0, b"XXXX")


def waiting(id: str, source: str, *steps: Steps, more: str = DEFER) -> Row:
    """A VMM with -incoming defer and a whole state to load."""
    return Row(id, source, take_over(more=more), connect(), capabilities("events"), *steps)


def bad_option(id: str, source: str, uri: str, text: str) -> Row:
    """A -incoming URI that ends the process."""
    return Row(id, source, take_over(more=f"-incoming {uri}"), exits(1, f"-incoming {uri}: {text}"))


ROWS = [
    waiting(
        "inmigrate-migrate",
        "4: migrate while INMIGRATE",
        refused("migrate", {"uri": FILE}, INMIGRATE),
        migration({}),
        status("inmigrate"),
        no_events(),
    ),
    waiting(
        "inmigrate-cont",
        "4: cont in inmigrate",
        talk("cont", None, "{}"),
        status("inmigrate"),
        still(),
        talk("migrate-incoming", {"uri": FILE}, *LOADED),
        survives(),
    ),
    waiting(
        "inmigrate-cont-overrides-S",
        "4: cont in inmigrate",
        talk("cont", None, "{}"),
        status("inmigrate"),
        talk("migrate-incoming", {"uri": FILE}, *LOADED),
        survives(),
        more=f"-S {DEFER}",
    ),
    waiting(
        "inmigrate-stop",
        "4: cont in inmigrate",
        talk("stop", None, "{}"),
        status("inmigrate"),
        talk("migrate-incoming", {"uri": FILE}, *LOADED_PAUSED),
        status("paused"),
        still(),
    ),
    waiting(
        "inmigrate-S",
        "4: new side with -S",
        talk("migrate-incoming", {"uri": FILE}, *LOADED_PAUSED),
        status("paused"),
        talk("cont", None, "RESUME", "{}"),
        counting(),
        more=f"-S {DEFER}",
    ),
    waiting(
        "inmigrate-parameters",
        "4: setting mode / cpr-exec-command on the incoming side",
        parameters(mode="cpr-exec", cpr_exec_command=["/x"]),
        talk("migrate-incoming", {"uri": FILE}, *LOADED),
        survives(),
    ),
    Row(
        "incoming-not-given",
        "4: migrate-incoming without -incoming",
        boot(),
        refused("migrate-incoming", {"uri": FILE}, NOT_GIVEN),
        refused("migrate-incoming", None, NOT_GIVEN),
        hmp(f"migrate_incoming {FILE}", f"Error: {NOT_GIVEN}"),
        migration({}),
        running(),
    ),
    waiting(
        "incoming-twice",
        "4: migrate-incoming twice",
        talk("migrate-incoming", {"uri": FILE}, *LOADED),
        refused("migrate-incoming", {"uri": FILE}, ALREADY),
        refused("migrate-incoming", None, ALREADY),
        survives(),
    ),
    Row(
        "incoming-after-failure",
        "4: migrate-incoming twice",
        take_over(stream=bad_magic, more=DEFER),
        connect(),
        qmp("migrate-incoming", {"uri": FILE, "exit-on-error": False}, {}),
        refused("migrate-incoming", {"uri": FILE}, ALREADY),
    ),
    waiting(
        "incoming-no-file",
        "4: migrate-incoming no such file",
        talk(
            "migrate-incoming",
            {"uri": "file:$dir/missing"},
            "setup",
            "error: Could not open '$dir/missing': No such file or directory",
        ),
        status("inmigrate"),
        migration({"status": "setup"}),
        refused("migrate-incoming", {"uri": FILE}, "Illegal migration incoming state: setup"),
        still(),
    ),
    waiting(
        "incoming-unknown-protocol",
        "4: migrate-incoming no such file",
        refused("migrate-incoming", {"uri": "bogus:x"}, "unknown migration protocol: bogus:x"),
        migration({}),
        talk("migrate-incoming", {"uri": FILE}, *LOADED),
        survives(),
    ),
    Row(
        "incoming-bad-stream-lives",
        "4: migrate-incoming exit-on-error=false, bad stream",
        take_over(stream=bad_magic, more=DEFER),
        connect(),
        capabilities("events"),
        talk(
            "migrate-incoming",
            {"uri": FILE, "exit-on-error": False},
            "setup",
            "{}",
            "active",
            "failed",
        ),
        status("inmigrate"),
        migration({"status": "failed", "error-desc": BAD_MAGIC}),
        hmp("info migrate", f"Status: \t\tfailed ({BAD_MAGIC})"),
        talk("cont", None, "{}"),
        status("inmigrate"),
        still(),
        talk("quit", None, "SHUTDOWN host-qmp-quit", "{}", "EOF"),
        exits(0),
    ),
    Row(
        "incoming-bad-stream-ends",
        "2: loader errors: exit 1 when exit-on-error=true",
        take_over(stream=bad_magic, more=DEFER),
        connect(),
        capabilities("events"),
        talk("migrate-incoming", {"uri": FILE}, "setup", "{}", "active", "failed", "EOF"),
        exits(1, BAD_MAGIC),
    ),
    waiting(
        "incoming-by-hmp",
        "3: HMP on a pty: migrate_incoming",
        hmp("info status", "VM status: paused (inmigrate)"),
        hmp("info migrate"),
        hmp(f"migrate_incoming {FILE}"),
        comes_to("running"),
        hmp("info migrate", "Status: \t\tcompleted"),
        counting(),
    ),
    bad_option(
        "incoming-option-protocol",
        '4: bogus:x, ""',
        "bogus:x",
        "unknown migration protocol: bogus:x",
    ),
    bad_option(
        "incoming-option-offset",
        "4: file:…,offset=zzz",
        "file:$dir/state,offset=zzz",
        "file URI has bad offset zzz: Invalid argument",
    ),
    bad_option(
        "incoming-option-tcp",
        '4: bogus:x, ""',
        "tcp:1",
        "error parsing address '1'",
    ),
    bad_option(
        "incoming-option-unix",
        '4: bogus:x, ""',
        "unix:/nonexistent/x",
        "Failed to bind socket to /nonexistent/x: No such file or directory",
    ),
    Row(
        "incoming-option-json",
        "5: -incoming channel",
        take_over(more="-incoming '{}'"),
        exits(1, "-incoming {}: Parameter 'channel-type' is missing"),
    ),
]
