"""Part 4: what `migrate` refuses before anything happens, and channels that cannot be opened."""

from __future__ import annotations

import signal
from typing import Any

from ..lab import Lab
from ..match import expect, like
from ..messages import maybe
from ..row import Row, Steps, step
from ..steps import (
    FILE,
    boot,
    capabilities,
    exits,
    guest,
    hmp,
    migration,
    parameters,
    refused,
    running,
    talk,
)

BROKEN_SETUP = "ram_save_setup failed: Input/output error"
BROKEN_PIPE = r"Failed to .+: Unable to write to command: Broken pipe"
CRASHED = -signal.SIGSEGV
NO_COMMAND = "cpr-exec mode requires setting cpr-exec-command"
EITHER = "need either 'uri' or 'channels' argument"
NO_RESUME = "Cannot resume if there is no paused migration"
INMIGRATE = "Guest is waiting for an incoming migration"
POSTMIGRATE = "Can't migrate the vm that was paused due to previous migration"
NO_CHANCE = ["/nonexistent"]
"""A command that cannot be executed: should `migrate` come that far, the guest still lives."""

PRIVATE = "-m 16M -object memory-backend-memfd,id=ram0,size=16M,share=off"
ADDRESS = {"transport": "file", "filename": "$dir/state", "offset": 0}


def incompatible(region: str) -> str:
    """Why RAM that cannot be handed over blocks a migration."""
    return (
        f"Memory region {region} is not compatible with CPR. share=on is required for "
        "memory-backend objects, and aux-ram-share=on is required."
    )


def channel(kind: str, **address: Any) -> dict[str, Any]:
    return {"channel-type": kind, "addr": address or ADDRESS}


def ready(options: str = guest()) -> Steps:
    """A guest whose update would be refused by nothing."""
    return [
        boot(options),
        capabilities("events"),
        parameters(mode="cpr-exec", cpr_exec_command=NO_CHANCE),
    ]


@step
def no_state_file(lab: Lab) -> None:
    expect("state file", False, lab.path("$dir/state").exists(), lab.names)


def at_once(id: str, source: str, arguments: Any, text: Any, *more: Steps) -> Row:
    """`migrate` with these arguments is refused without an event; the guest never stops."""
    return Row(
        id,
        f"4: {source}",
        ready(),
        more,
        refused("migrate", arguments, text),
        migration({}),
        no_state_file(),
        running(),
    )


def set_up(id: str, source: str, uri: str, text: str) -> Row:
    """The channel cannot be opened: `failed` comes before the error; the guest never stops."""
    return Row(
        id,
        f"4: {source}",
        ready(),
        talk("migrate", {"uri": uri}, "setup", "failing", "failed", f"error: {text}"),
        migration({"status": "failed", "error-desc": text}),
        running(),
    )


def in_background(id: str, source: str, uri: str, text: str) -> Row:
    """Nobody listens: `migrate` is answered first; the guest never stops."""
    return Row(
        id,
        f"4: {source}",
        ready(),
        talk("migrate", {"uri": uri}, "setup", "{}", "failing", "failed"),
        migration({"status": "failed", "error-desc": text}),
        running(),
    )


ROWS = [
    at_once(
        "migrate-no-command",
        "no/empty cpr-exec-command",
        {"uri": FILE},
        NO_COMMAND,
        parameters(cpr_exec_command=[]),
    ),
    at_once("migrate-nothing", "no uri, both uri and channels, channels []", None, EITHER),
    at_once(
        "migrate-uri-and-channels",
        "no uri, both uri and channels, channels []",
        {"uri": FILE, "channels": [channel("main")]},
        EITHER,
    ),
    at_once(
        "migrate-channels-empty",
        "no uri, both uri and channels, channels []",
        {"channels": []},
        EITHER,
    ),
    at_once(
        "migrate-unknown-argument",
        "migrate foo=1, also detach=true",
        {"uri": FILE, "foo": 1},
        "Parameter 'foo' is unexpected",
    ),
    at_once(
        "migrate-detach",
        "migrate foo=1, also detach=true",
        {"uri": FILE, "detach": True},
        "Parameter 'detach' is unexpected",
    ),
    at_once(
        "migrate-uri-number",
        'bogus:x, ""',
        {"uri": 3},
        "Invalid parameter type for 'uri', expected: string",
    ),
    at_once("migrate-resume", "migrate resume=true", {"uri": FILE, "resume": True}, NO_RESUME),
    at_once(
        "migrate-unknown-protocol",
        'bogus:x, ""',
        {"uri": "bogus:x"},
        "unknown migration protocol: bogus:x",
    ),
    at_once("migrate-empty-uri", 'bogus:x, ""', {"uri": ""}, "unknown migration protocol: "),
    at_once(
        "migrate-bad-offset",
        "file:…,offset=zzz",
        {"uri": f"{FILE},offset=zzz"},
        "file URI has bad offset zzz: Invalid argument",
    ),
    at_once(
        "migrate-unix-without-path",
        'bogus:x, ""',
        {"uri": "unix:"},
        "invalid Unix socket address",
    ),
    at_once(
        "migrate-tcp-without-port", 'bogus:x, ""', {"uri": "tcp:1"}, "error parsing address '1'"
    ),
    at_once(
        "migrate-two-main-channels",
        "two main channels",
        {"channels": [channel("main"), channel("main")]},
        "Channel list has more than one main entry",
    ),
    at_once(
        "migrate-channel-without-address",
        "two main channels",
        {"channels": [{"channel-type": "main"}]},
        "Parameter 'channels[0].addr' is missing",
    ),
    at_once(
        "migrate-channel-bogus-type",
        "two main channels",
        {"channels": [channel("bogus")]},
        "Parameter 'channel-type' does not accept value 'bogus'",
    ),
    at_once(
        "migrate-channel-bogus-transport",
        "two main channels",
        {"channels": [channel("main", transport="bogus")]},
        "Parameter 'transport' does not accept value 'bogus'",
    ),
    at_once(
        "migrate-channel-without-filename",
        "two main channels",
        {"channels": [channel("main", transport="file")]},
        "Parameter 'channels[0].addr.filename' is missing",
    ),
    at_once(
        "migrate-channels-number",
        "two main channels",
        {"channels": 3},
        "Invalid parameter type for 'channels', expected: array",
    ),
    Row(
        "migrate-no-main-channel",
        "4: no main channel",
        ready(),
        qemu=[talk("migrate", {"channels": [channel("cpr")]}, "EOF"), exits(CRASHED)],
        cpr=[
            refused("migrate", {"channels": [channel("cpr")]}, like("(?i).*main.*")),
            migration({}),
            running(),
        ],
    ),
    set_up(
        "migrate-no-such-directory",
        "file: bad directory / a directory / /dev/full",
        "file:/nonexistent/x",
        "Could not create '/nonexistent/x': No such file or directory",
    ),
    set_up(
        "migrate-to-directory",
        "file: bad directory / a directory / /dev/full",
        "file:$dir",
        "Could not create '$dir': Is a directory",
    ),
    set_up(
        "migrate-to-dev-full",
        "file: bad directory / a directory / /dev/full",
        "file:/dev/full",
        "failed to truncate migration file to offset 0: Invalid argument",
    ),
    set_up(
        "migrate-file-without-path",
        "file: bad directory / a directory / /dev/full",
        "file:",
        "Could not create '': No such file or directory",
    ),
    set_up(
        "migrate-fd-unknown",
        "fd:nope",
        "fd:nope",
        "File descriptor named 'nope' has not been found",
    ),
    in_background(
        "migrate-unix-nobody",
        "unix: nobody listens",
        "unix:$dir/nobody.sock",
        "Failed to connect to '$dir/nobody.sock': No such file or directory",
    ),
    in_background(
        "migrate-tcp-nobody",
        "tcp: nobody listens",
        "tcp:127.0.0.1:1",
        "Failed to connect to '127.0.0.1:1': Connection refused",
    ),
    Row(
        "migrate-exec-false",
        "4: exec:false",
        ready(),
        talk(
            "migrate",
            {"uri": "exec:false"},
            "setup",
            "STOP",
            "{}",
            "active",
            # As far as it comes before `false` has ended.
            maybe("pass:2"),
            maybe("device"),
            "failing",
            "RESUME",
            "failed",
        ),
        migration({"status": "failed", "error-desc": like(f"{BROKEN_SETUP}|{BROKEN_PIPE}")}),
        running(),
    ),
    Row(
        "migrate-errors-by-hmp",
        "3: HMP errors",
        boot(),
        hmp("migrate_set_parameter mode cpr-exec"),
        hmp(f"migrate -d {FILE}", f"Error: {NO_COMMAND}"),
        hmp("migrate bogus:x", "Error: unknown migration protocol: bogus:x"),
        hmp("info migrate"),
        hmp("migrate", "migrate: string expected", 'Try "help migrate" for more information'),
        running(),
    ),
    Row(
        "unknown-command",
        "4: unknown command",
        boot(),
        refused("query-foo", None, "The command query-foo has not been found", "CommandNotFound"),
    ),
]
