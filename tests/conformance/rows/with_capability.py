"""Part 4: the capabilities that an update goes with, and those that it does not."""

from __future__ import annotations

from ..match import like
from ..row import Row, Step, Steps
from ..steps import (
    DEFER,
    EXEC,
    FILE,
    STARTED,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    exits,
    goes_on_in_the_old_image,
    migration,
    new_command,
    qmp,
    refused,
    running,
    survives,
    talk,
)
from .migrate import at_once, ready


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
        new_side,
        qmp("migrate-incoming", {"uri": FILE}, {}),
        [] if ends else survives(),
        **ends,
    )


def capability_on_one_side(name: str) -> Row:
    """A capability that is in the stream and not set on the new side: QEMU's guest is lost."""
    lines = (
        f"Capability {name} is off, but received capability is on",
        "load of migration failed: Invalid argument: post load hook failed for: configuration, "
        "version_id: 1, minimum_version: 0: Failed to validate capabilities",
    )
    return Row(
        f"migrate-with-{name}-on-one-side",
        ACCEPTED,
        boot(),
        counting(),
        capabilities(name),
        new_command(),
        qmp("migrate", {"uri": FILE}, {}),
        qemu=[exits(1, *lines)],
        cpr=[goes_on_in_the_old_image(*lines)],
    )


MULTI_CHANNEL = "Migration requires multi-channel URIs (e.g. tcp)"
IN_RAM = (
    "load of migration failed: Invalid argument: error while loading state for instance 0x0 of "
    "device 'ram': Failed to load vmstate version_id: 4, ret: -22"
)
ACCEPTED = (
    "4: mapped-ram, x-ignore-shared, validate-uuid, auto-converge, xbzrle, release-ram, "
    "late-block-activate"
)

ROWS = [
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
]
