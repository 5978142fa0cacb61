"""Part 5: cpr-reboot: the guest waits in its RAM file, or all of it in the state's, while no VMM runs."""

from __future__ import annotations

from ..match import has
from ..row import Row, Step, step
from ..steps import (
    DEFER,
    FILE,
    STARTED,
    Lab,
    Mismatch,
    boot,
    capabilities,
    comes_to,
    counting,
    exits,
    guest,
    hmp,
    migration,
    parameters,
    qmp,
    status,
    still,
    talk,
)
from .failed_exec import state_memfds
from .incoming import LOADED, LOADED_PAUSED
from .process import backend
from .transfer import COMPLETED, went_on_from

SHARED = guest(
    ram=backend("file", "mem-path=$dir/ram,share=on"), machine="-machine pc,memory-backend=ram0"
)
PRIVATE = guest(ram="-m 16M", machine="-machine pc")
IGNORE = "x-ignore-shared"
SAVED = (*STARTED, "completed")
SAVED_PAUSED = ("setup", "{}", "active", "pass:2", "device", "completed")


def prepared(*names: str) -> list[Step]:
    return [capabilities("events", *names), parameters(mode="cpr-reboot")]


@step
def state_size(lab: Lab, least: int, most: int) -> None:
    """The size of the state file, in bytes."""
    size = lab.path("$dir/state").stat().st_size
    if not least <= size <= most:
        raise Mismatch(f"the state has {size} bytes, not {least} to {most}")


def ended() -> list[Step]:
    return [talk("quit", None, "SHUTDOWN host-qmp-quit", "{}", "EOF"), exits(0)]


def started_again(options: str, *names: str) -> list[Step]:
    """A new process that waits for the state."""
    return [boot(f"{options} {DEFER}", "dst"), status("inmigrate"), *prepared(*names)]


def reboot(id: str, options: str, *names: str, size: Step) -> Row:
    """Save, quit, start again, load: the guest goes on where it was."""
    return Row(
        f"reboot-{id}",
        "5: cpr-reboot",
        boot(options, "src"),
        counting(),
        prepared(*names),
        talk("migrate", {"uri": FILE}, *SAVED),
        comes_to("postmigrate"),
        hmp("info status", "VM status: paused (postmigrate)"),
        migration(COMPLETED),
        state_memfds(0),
        still(),
        size,
        ended(),
        started_again(options, *names),
        talk("migrate-incoming", {"uri": FILE}, *LOADED),
        status("running"),
        migration({"status": "completed"}),
        went_on_from("src"),
        counting(),
    )


ROWS = [
    reboot("shared-file", SHARED, IGNORE, size=state_size(1 << 10, 2 << 20)),
    reboot("private-ram", PRIVATE, size=state_size(64 << 10, 32 << 20)),
    reboot("shared-file-copied", SHARED, size=state_size(64 << 10, 32 << 20)),
    reboot("private-ram-ignore-shared", PRIVATE, IGNORE, size=state_size(64 << 10, 32 << 20)),
    Row(
        "reboot-paused",
        "5: cpr-reboot: Paused before: paused after, no RESUME",
        boot(SHARED, "src"),
        counting(),
        qmp("stop"),
        prepared(IGNORE),
        talk("migrate", {"uri": FILE}, "STOP", *SAVED_PAUSED),
        comes_to("postmigrate"),
        ended(),
        started_again(SHARED, IGNORE),
        talk("migrate-incoming", {"uri": FILE}, *LOADED_PAUSED),
        status("paused"),
        still(),
        talk("cont", None, "RESUME", "{}"),
        went_on_from("src"),
        counting(),
    ),
    Row(
        "reboot-incoming-option",
        "5: cpr-reboot",
        boot(PRIVATE, "src"),
        counting(),
        prepared(),
        talk("migrate", {"uri": FILE}, *SAVED),
        ended(),
        boot(f"{PRIVATE} -incoming {FILE}", "dst"),
        comes_to("running"),
        went_on_from("src"),
        counting(),
    ),
    Row(
        "reboot-cont",
        "3: postmigrate",
        boot(PRIVATE),
        counting(),
        prepared(),
        talk("migrate", {"uri": FILE}, *SAVED),
        comes_to("postmigrate"),
        talk("cont", None, "RESUME", "{}"),
        status("running"),
        counting(),
        migration(has({"status": "completed"})),
    ),
    Row(
        "reboot-ignores-command",
        "5: cpr-reboot",
        boot(PRIVATE),
        counting(),
        prepared(),
        parameters(cpr_exec_command=["/nonexistent"]),
        talk("migrate", {"uri": FILE}, *SAVED),
        comes_to("postmigrate"),
    ),
]
