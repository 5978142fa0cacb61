"""Part 4: what `migrate` refuses before anything happens, and in which order it looks."""

from __future__ import annotations

import signal
from typing import Any

from ..match import like
from ..row import Row, Step, Steps, step
from ..steps import (
    DEFER,
    EXEC,
    FILE,
    STARTED,
    Lab,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    events,
    exits,
    expect,
    guest,
    hmp,
    maybe,
    migration,
    new_command,
    no_events,
    parameters,
    qmp,
    refused,
    running,
    start,
    status,
    survives,
    talk,
)

BROKEN_SETUP = "ram_save_setup failed: Input/output error"
BROKEN_PIPE = r"Failed to .+: Unable to write to command: Broken pipe"
CRASHED = -signal.SIGSEGV
NO_COMMAND = "cpr-exec mode requires setting cpr-exec-command"
EITHER = "need either 'uri' or 'channels' argument"
MULTI_CHANNEL = "Migration requires multi-channel URIs (e.g. tcp)"
NO_RESUME = "Cannot resume if there is no paused migration"
INMIGRATE = "Guest is waiting for an incoming migration"
POSTMIGRATE = "Can't migrate the vm that was paused due to previous migration"
INCOMPATIBLE = (
    "Memory region ram0 is not compatible with CPR. share=on is required for memory-backend "
    "objects, and aux-ram-share=on is required."
)
IN_RAM = (
    "load of migration failed: Invalid argument: error while loading state for instance 0x0 of "
    "device 'ram': Failed to load vmstate version_id: 4, ret: -22"
)
ACCEPTED = (
    "4: mapped-ram, x-ignore-shared, validate-uuid, auto-converge, xbzrle, release-ram, "
    "late-block-activate"
)
NO_CHANCE = ["/nonexistent"]
"""A command that cannot be executed: should `migrate` come that far, the guest still lives."""

PRIVATE = "-m 16M -object memory-backend-memfd,id=ram0,size=16M,share=off"
ADDRESS = {"transport": "file", "filename": "$dir/state", "offset": 0}


def channel(kind: str, **address: Any) -> dict[str, Any]:
    return {"channel-type": kind, "addr": address or ADDRESS}


def ready(options: str = guest()) -> list[Step]:
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
        *more,
        refused("migrate", arguments, text),
        migration({}),
        no_state_file(),
        running(),
    )


def set_up(id: str, source: str, uri: str, text: str) -> Row:
    """The channel cannot be opened: `failed` comes before the error reply; the guest never stops."""
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


def no_cpr(names: str, text: str) -> Row:
    """A capability that CPR cannot be used with."""
    return Row(
        f"migrate-with-{names.split()[-1]}",
        "4: postcopy-ram, dirty-bitmaps"
        if "postcopy" in text
        else f"4: {names.split()[-1]}" + (" (needs return-path)" if " " in names else ""),
        ready(),
        capabilities(*names.split()),
        refused("migrate", {"uri": FILE}, text),
        migration({}),
        running(),
    )


def with_capability(name: str, *new_side: Step, **ends: Steps) -> Row:
    """A capability that makes no difference: the exec happens, and the guest goes on.

    `new_side` are steps that the new image needs for that; `ends` other expectations of the end.
    """
    return Row(
        f"migrate-with-{name}",
        ACCEPTED,
        boot(),
        counting(),
        capabilities("events", name),
        new_command(DEFER),
        talk("migrate", {"uri": FILE}, *EXEC),
        connect(),
        comes_to("inmigrate"),
        *new_side,
        qmp("migrate-incoming", {"uri": FILE}, {}),
        *([] if ends else survives()),
        **ends,
    )


def capability_on_one_side(name: str) -> Row:
    """A capability that is in the stream and not set on the new side: the guest is lost."""
    return Row(
        f"migrate-with-{name}-on-one-side",
        ACCEPTED,
        boot(),
        counting(),
        capabilities(name),
        new_command(),
        qmp("migrate", {"uri": FILE}, {}),
        exits(
            1,
            f"Capability {name} is off, but received capability is on",
            "load of migration failed: Invalid argument: post load hook failed for: configuration, "
            "version_id: 1, minimum_version: 0: Failed to validate capabilities",
        ),
    )


def paused_for_good() -> list[Step]:
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


IVSHMEM = "-object memory-backend-memfd,id=shm0,size=1M,share=on -device ivshmem-plain,memdev=shm0"
NVME = "-device nvme,serial=1"
PEER = "Migration is disabled when using feature 'peer mode' in device 'ivshmem'"

def no_such_device(device: str) -> str:
    """What is said of a device that this VMM does not have."""
    return f"-device {device}: '{device.partition(',')[0]}' is not a valid device model name"


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
        "bogus:x, \"\"",
        {"uri": 3},
        "Invalid parameter type for 'uri', expected: string",
    ),
    at_once(
        "migrate-resume", "migrate resume=true", {"uri": FILE, "resume": True}, NO_RESUME
    ),
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
    no_cpr("postcopy-ram", "Cannot use postcopy with CPR"),
    no_cpr("dirty-bitmaps", "Cannot use postcopy with CPR"),
    no_cpr("background-snapshot", "Cannot use background snapshot with CPR"),
    no_cpr("return-path x-colo", "Cannot use COLO with CPR"),
    at_once(
        "migrate-multifd-file",
        "multifd + file/exec URI",
        {"uri": FILE},
        MULTI_CHANNEL,
        capabilities("multifd"),
    ),
    at_once(
        "migrate-multifd-exec",
        "multifd + file/exec URI",
        {"uri": "exec:cat > $dir/state"},
        MULTI_CHANNEL,
        capabilities("multifd"),
    ),
    with_capability(
        "mapped-ram",
        capabilities("mapped-ram"),
        qemu=[exits(1, like(r"\(ram0\) failed to read page .*"), IN_RAM)],
        cpr=[survives()],
    ),
    with_capability("x-ignore-shared", capabilities("x-ignore-shared")),
    capability_on_one_side("mapped-ram"),
    capability_on_one_side("x-ignore-shared"),
    *(
        with_capability(name)
        for name in (
            "validate-uuid",
            "auto-converge",
            "xbzrle",
            "release-ram",
            "late-block-activate",
        )
    ),
    Row(
        "migrate-with-return-path",
        "4: return-path + file",
        ready(),
        capabilities("return-path"),
        talk("migrate", {"uri": FILE}, *STARTED, "failing", "RESUME", "failed"),
        migration(
            {"status": "failed", "error-desc": "Unable to read from file: Bad file descriptor"}
        ),
        running(),
    ),
    Row(
        "migrate-blocked-device",
        "4: non-migratable device (ivshmem peer)",
        qemu=[
            boot(guest(IVSHMEM)),
            parameters(mode="cpr-exec", cpr_exec_command=NO_CHANCE),
            refused("migrate", {"uri": FILE}, PEER),
            migration({"blocked-reasons": [PEER]}),
            running(),
        ],
        cpr=[start(guest(IVSHMEM)), exits(1, no_such_device("ivshmem-plain,memdev=shm0"))],
    ),
    Row(
        "migrate-nvme",
        "4: -device nvme",
        qemu=[
            boot(guest(NVME)),
            new_command(),
            qmp("migrate", {"uri": FILE}, {}),
            exits(CRASHED),
        ],
        cpr=[start(guest(NVME)), exits(1, no_such_device("nvme,serial=1"))],
    ),
    Row(
        "migrate-private-ram",
        "4: RAM without share=on, private file, no backend, no aux-ram-share",
        boot(guest(ram=PRIVATE)),
        counting(),
        new_command(),
        qemu=[
            migration({}),
            qmp("migrate", {"uri": FILE}, {}),
            exits(1, like(".*'kvm-tpr-opt'.*")),
        ],
        cpr=[
            migration({"blocked-reasons": [INCOMPATIBLE]}),
            refused("migrate", {"uri": FILE}, INCOMPATIBLE),
            running(),
        ],
    ),
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
        refused("migrate", {"uri": "unix:$dir/nobody.sock"}, INCOMPATIBLE),
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
        refused(
            "query-foo", None, "The command query-foo has not been found", "CommandNotFound"
        ),
    ),
]
