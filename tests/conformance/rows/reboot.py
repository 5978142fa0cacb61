"""Part 5: cpr-reboot: in between no VMM runs, and the guest is in files."""

from __future__ import annotations

from ..lab import Lab
from ..match import Mismatch, has, like
from ..row import Row, Step, Steps, step
from ..steps import (
    DEFER,
    FILE,
    LOADED,
    LOADED_PAUSED,
    STARTED,
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
from .process import backend
from .transfer import COMPLETED, went_on_from

SHARED = guest(
    ram=backend("file", "mem-path=$dir/ram,share=on"), machine="-machine pc,memory-backend=ram0"
)
PRIVATE = guest(ram="-m 16M", machine="-machine pc")
IGNORE = "x-ignore-shared"
SAVED = (*STARTED, "completed")
SAVED_PAUSED = ("setup", "{}", "active", "pass:2", "device", "completed")


COMPLETED_LINES = [
    "Status: \t\tcompleted",
    like(r"Time \(ms\): \t\ttotal=\d+, setup=\d+, down=\d+"),
    "RAM info:",
    like(r"  Throughput \(Mbps\): \t[\d.]+"),
    like(r"  Sizes: \t\tpagesize=4 KiB, total=[\d.]+ [KM]iB"),
    like(r"  Transfers: \t\ttransferred=[\d.]+ [KM]iB, remain=0 B"),
    "    Channels: \t\tprecopy=0 B, multifd=0 B, postcopy=0 B",
    like(r"    Page Types: \tnormal=\d+, zero=\d+"),
    "  Page Rates (pps): \ttransfer=0",
    like(r"  Others: \t\tdirty_syncs=2, downtime_bytes=\d+"),
]


def prepared(*names: str) -> Steps:
    return [capabilities("events", *names), parameters(mode="cpr-reboot")]


@step
def state_size(lab: Lab, least: int, most: int) -> None:
    """The size of the state file, in bytes."""
    size = lab.path("$dir/state").stat().st_size
    if not least <= size <= most:
        raise Mismatch(f"the state has {size} bytes, not {least} to {most}")


def ended() -> Steps:
    return [talk("quit", None, "SHUTDOWN host-qmp-quit", "{}", "EOF"), exits(0)]


def started_again(options: str, *names: str) -> Steps:
    """A new process that waits for the state."""
    return [boot(f"{options} {DEFER}", "dst"), status("inmigrate"), prepared(*names)]


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
        hmp("info migrate", *COMPLETED_LINES),
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
