"""Part 3: the human monitor on a terminal, which the new image goes on with."""

from __future__ import annotations

import time

from ..lab import Lab
from ..match import Mismatch, expect, like, matches
from ..process import DEADLINE
from ..row import Row, Steps, step
from ..steps import (
    FILE,
    connect,
    counting,
    guest,
    migration_comes_to,
    stderr,
    survives,
)
from ..terminal import Terminal
from .failed_exec import NO_SUCH_FILE

STDIO = "-monitor stdio"
BANNER = r"QEMU \S+ monitor - type 'help' for more information"
PROMPT = "(qemu) "
MODE = "migrate_set_parameter mode cpr-exec"
COMMAND = "migrate_set_parameter cpr-exec-command"


def screen(lab: Lab) -> Terminal:
    terminal = lab.vm.terminal
    if terminal is None:
        raise Mismatch(f"{lab.vm.name} has no terminal")
    return terminal


def wait_for(lab: Lab, *lines: object) -> None:
    """Waits until these are the last lines on the screen, but for what this VMM adds."""

    def seen(shown: list[str]) -> bool:
        last = [line for line in shown[-len(lines) - 1 :] if not line.startswith("Update:")]
        return matches(lines, last[-len(lines) :], lab.names)

    screen(lab).wait_for(seen, f"waiting for {lines}")


@step
def boot_on_terminal(lab: Lab) -> None:
    """Starts a VMM with its monitor on a pty; the banner and the prompt come.

    $command is its command line, $initial and $flags those of the terminal before and now.
    """
    lab.start_on_terminal("vm", guest(STDIO))
    lab.names["initial"] = oct(screen(lab).local_flags())
    wait_for(lab, like(BANNER), PROMPT)
    lab.names["flags"] = oct(screen(lab).local_flags())
    lab.names["command"] = " ".join(lab.vm.process.command_line())
    if lab.names["initial"] == lab.names["flags"]:
        raise Mismatch("the monitor edits no lines: it has left the terminal as it was")


@step
def typed(lab: Lab, line: str, *lines: object) -> None:
    """A line is typed, these lines come, and a prompt."""
    line = lab.fill(line)
    screen(lab).type(line)
    wait_for(lab, PROMPT + line, *lines, PROMPT)


@step
def typed_until(lab: Lab, line: str, *lines: object) -> None:
    """A line is typed, again and again, until these lines come, and a prompt."""
    wanted = (PROMPT + line, *lines, PROMPT)
    deadline = time.monotonic() + DEADLINE
    while True:
        screen(lab).type(line)
        screen(lab).wait_for(lambda seen: matches(PROMPT, seen[-1], lab.names), "the prompt")
        shown = screen(lab).lines[-len(wanted) :]
        if matches(wanted, shown, lab.names):
            return
        if time.monotonic() > deadline:
            raise Mismatch(f"{line}: the screen ends with {shown}, not {wanted}")


@step
def typed_at_last(lab: Lab, line: str) -> None:
    """A line is typed, and nothing comes any more."""
    screen(lab).type(line)
    lab.vm.process.wait()
    wait_for(lab, PROMPT + line, "")


@step
def terminal_flags(lab: Lab, flags: str) -> None:
    expect("terminal flags", flags, oct(screen(lab).local_flags()), lab.names)


def prepared(*more: str) -> Steps:
    """A VMM on a terminal that is told what to execute."""
    words = " ".join(more)
    return [
        boot_on_terminal(),
        connect(),
        counting(),
        typed("info status", "VM status: running"),
        typed(MODE),
        typed(f"{COMMAND} {words}"),
    ]


def goes_on(status: str) -> Steps:
    """The new image has the terminal as it was, and answers what is typed."""
    return [terminal_flags("$flags"), typed("info status", f"VM status: {status}")]


NEW_URI = f"$command -incoming {FILE}"

ROWS = [
    Row(
        "terminal-update",
        "3: HMP on a pty: migrate -d",
        prepared(NEW_URI),
        typed("info migrate"),
        typed(f"migrate -d {FILE}", like(r"\(qemu\) " + BANNER)),
        goes_on("running"),
        typed("info migrate", "Status: \t\tcompleted"),
        connect(),
        survives(),
    ),
    Row(
        "terminal-update-without-d",
        "3: HMP on a pty: without -d the old prompt does not come back",
        prepared(NEW_URI),
        typed(f"migrate {FILE}", like(BANNER)),
        goes_on("running"),
        connect(),
        survives(),
    ),
    Row(
        "terminal-defer",
        "3: HMP on a pty: migrate_incoming",
        prepared("$command -incoming defer"),
        typed(f"migrate -d {FILE}", like(r"\(qemu\) " + BANNER)),
        goes_on("paused (inmigrate)"),
        typed("info migrate"),
        typed(f"migrate_incoming {FILE}"),
        typed_until("info status", "VM status: running"),
        typed("info migrate", "Status: \t\tcompleted"),
        connect(),
        counting(),
    ),
    Row(
        "terminal-failed-exec",
        "3: HMP on a pty: failed",
        prepared("/nonexistent/command x"),
        typed(f"migrate -d {FILE}"),
        migration_comes_to({"status": "failed", "error-desc": NO_SUCH_FILE}),
        typed("info migrate", f"Status: \t\tfailed ({NO_SUCH_FILE})"),
        goes_on("running"),
        stderr(NO_SUCH_FILE),
        counting(),
        typed_at_last("quit"),
        terminal_flags("$initial"),
    ),
    Row(
        "terminal-twice",
        "3: HMP on a pty: migrate -d",
        prepared(NEW_URI),
        typed(f"migrate -d {FILE}", like(r"\(qemu\) " + BANNER)),
        typed(MODE),
        typed(f"{COMMAND} {NEW_URI}"),
        typed(f"migrate -d {FILE}", like(r"\(qemu\) " + BANNER)),
        goes_on("running"),
    ),
    Row(
        "terminal-flags-after-quit",
        "3: HMP on a pty: termios lflag the same before and after",
        prepared(NEW_URI),
        typed(f"migrate -d {FILE}", like(r"\(qemu\) " + BANNER)),
        goes_on("running"),
        typed_at_last("quit"),
        qemu=[terminal_flags("$flags")],
        cpr=[terminal_flags("$initial")],
    ),
    Row(
        "terminal-errors",
        "3: HMP errors",
        boot_on_terminal(),
        typed("bogus", "unknown command: 'bogus'"),
        typed(
            "migrate_set_parameter",
            "migrate_set_parameter: string expected",
            'Try "help migrate_set_parameter" for more information',
        ),
        typed("migrate_set_parameter bogus 1", "Error: invalid parameter value: bogus"),
    ),
]
