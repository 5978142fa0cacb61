"""What a row can do with a VMM, and look at: the words that the table is written in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from harness.qmp import Closed

from .lab import Lab, Vm
from .match import ANY, OWN_LINES, Mismatch, expect, has, matches
from .messages import abbreviate, follow
from .process import DEADLINE, POLL
from .row import Step, Steps, step

RAM = "-m 16M -object memory-backend-memfd,id=ram0,size=16M,share=on"
MACHINE = "-machine pc,memory-backend=ram0,aux-ram-share=on"
DRIVE = "-drive file=$dir/guest.img,format=raw,if=floppy"
FILE = "file:$dir/state"
INCOMING = f"-incoming {FILE}"
DEFER = "-incoming defer"
INFORMATION = "info: "  # of what a VMM of ours says without being asked
QUIET = 0.03
"""Seconds in which a guest that runs would have counted on."""


def guest(more: str = "", ram: str = RAM, machine: str = MACHINE, drive: str = DRIVE) -> str:
    """The options of a VMM with the counting guest."""
    return f"-nodefaults -display none -accel tcg {ram} {machine} {drive} {more}"


# Starting and ending.


@step
def boot(lab: Lab, options: str = guest(), name: str = "vm", **more: Any) -> None:
    """Starts a VMM and connects to its QMP socket."""
    lab.boot(name, options, **more)


@step
def start(lab: Lab, options: str, name: str = "vm", **more: Any) -> None:
    """Starts a VMM that nobody talks to yet."""
    lab.start(name, options, **more)


@step
def connect(lab: Lab) -> None:
    """Connects to the QMP socket, of a VMM that has just started or of its new image."""
    lab.vm.connect()


@step
def reconnect(lab: Lab) -> None:
    """Waits for the exec to close the connection, and connects to the new image."""
    try:
        while True:
            lab.vm.qmp.read()
    except Closed:
        lab.vm.connect()


def on(name: str, *steps: Steps) -> Steps:
    """Steps that act on the VMM `name`, which the ones after them then act on too."""
    return [turn_to(name), steps]


@step
def turn_to(lab: Lab, name: str) -> None:
    lab.turn_to(name)


@step
def exits(lab: Lab, status: int, *stderr: Any) -> None:
    """The process ends with this status, and these are the lines on its stderr."""
    seen = lab.vm.process.wait()
    if seen is None:
        raise Mismatch(f"{lab.vm.name} still runs; stderr {stderr_texts(lab.vm)}")
    expect("exit status and stderr", (status, stderr), (seen, stderr_texts(lab.vm)), lab.names)


@step
def stderr(lab: Lab, *lines: Any) -> None:
    """These lines, and no others, come on stderr."""
    until(lambda: len(stderr_texts(lab.vm)) >= len(lines))
    expect("stderr", lines, stderr_texts(lab.vm), lab.names)


def stderr_texts(vm: Vm) -> list[str]:
    """The lines on stderr, without the name of the program that QEMU's begin with.

    What an update has cost is no complaint.
    """
    names = {os.path.basename(word) for word in vm.command} | {"cpr-vmm"}
    texts = []
    for line in vm.process.stderr_lines():
        program, colon, text = line.partition(": ")
        texts.append(text if colon and program in names else line)
    return [text for text in texts if not text.startswith(INFORMATION)]


@step
def look_at_process(lab: Lab) -> None:
    """From here on the process should have the same descriptors, environment and folder."""
    lab.look_at_process()


@step
def killed(lab: Lab) -> None:
    """Ends the VMM."""
    lab.vm.close()


def until(condition: Callable[[], bool], seconds: float = DEADLINE) -> bool:
    """Waits for `condition`; False where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


# QMP.


@step
def qmp(lab: Lab, command: str, arguments: Any = None, returns: Any = ANY) -> None:
    """A command that succeeds."""
    seen = lab.vm.qmp.execute(command, lab.fill(arguments))
    expect(f"reply to {command}", {"return": returns}, seen, lab.names)


@step
def refused(
    lab: Lab, command: str, arguments: Any, text: Any, error_class: str = "GenericError"
) -> None:
    """A command that fails with this error."""
    seen = lab.vm.qmp.execute(command, lab.fill(arguments))
    expected = {"error": {"class": error_class, "desc": text}}
    expect(f"reply to {command}", expected, seen, lab.names)


@step
def talk(lab: Lab, command: str, arguments: Any, *messages: Any) -> None:
    """Sends a command; then exactly these messages come, reply and events, in this order."""
    lab.vm.qmp.send(command, lab.fill(arguments))
    follow(lab.vm.qmp, messages, lab.names)


@step
def events(lab: Lab, *messages: Any) -> None:
    """Exactly these messages come next."""
    follow(lab.vm.qmp, messages, lab.names)


@step
def no_events(lab: Lab) -> None:
    """No event has come since the last that was looked at."""
    lab.vm.query("query-status")
    expect("events", [], [abbreviate(each) for each in lab.vm.qmp.events], lab.names)


@step
def forget_events(lab: Lab) -> None:
    """What has come so far is of no interest."""
    lab.vm.query("query-status")
    lab.vm.qmp.events.clear()


# The guest and its migration.


@step
def status(lab: Lab, name: str) -> None:
    """query-status says this now."""
    expected = {"status": name, "running": name == "running"}
    expect("query-status", expected, lab.vm.query("query-status"), lab.names)


@step
def comes_to(lab: Lab, name: str) -> None:
    """query-status says this sooner or later; events until then are of no interest."""
    until(lambda: lab.vm.query("query-status")["status"] == name)
    expect("query-status", has({"status": name}), lab.vm.query("query-status"), lab.names)
    lab.vm.qmp.events.clear()


@step
def migration(lab: Lab, expected: Any) -> None:
    """query-migrate says this now."""
    expect("query-migrate", expected, query_migrate(lab), lab.names)


def query_migrate(lab: Lab) -> Any:
    """What query-migrate says, without the members that are no part of QEMU's schema."""
    answer = lab.vm.query("query-migrate")
    return {name: value for name, value in answer.items() if not name.startswith("x-")}


@step
def migration_comes_to(lab: Lab, expected: Any) -> None:
    """query-migrate says this sooner or later."""
    until(lambda: matches(expected, query_migrate(lab), lab.names))
    expect("query-migrate", expected, query_migrate(lab), lab.names)


@step
def hmp(lab: Lab, line: str, *lines: Any) -> None:
    """An HMP command given through QMP prints these lines, each with CR LF."""
    seen = lab.vm.hmp(lab.fill(line)).split("\r\n")
    seen = [each for each in seen if not each.startswith(OWN_LINES)]
    expect(f"output of {line}", [*lines, ""], seen, lab.names)


@step
def counting(lab: Lab, afresh: bool = False) -> None:
    """The guest counts, and goes on from where it was last seen to count, or `afresh`."""
    vm = lab.vm
    vm.count = 0 if afresh else vm.count
    first = vm.counter()
    if not until(lambda: vm.counter() != first):
        raise Mismatch(f"the guest does not count: {first:#x}")
    now = vm.counter()
    if (now - vm.count) % (1 << 32) >= 1 << 31:
        raise Mismatch(f"the counter went back: from {vm.count:#x} to {now:#x}")
    vm.count = now


@step
def still(lab: Lab) -> None:
    """The guest does not count."""
    first = lab.vm.counter()
    time.sleep(QUIET)
    expect("counter", first, lab.vm.counter(), lab.names)


def running() -> Steps:
    """The guest runs and counts, and has never stopped."""
    return [status("running"), no_events(), counting()]


def capabilities(*names: str, state: bool = True) -> Step:
    each = [{"capability": name, "state": state} for name in names]
    return qmp("migrate-set-capabilities", {"capabilities": each}, {})


def parameters(**values: Any) -> Step:
    """Sets migration parameters; an underscore stands for a dash."""
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return qmp("migrate-set-parameters", named, {})


@step
def new_command(lab: Lab, more: str = INCOMING, options: str | None = None) -> None:
    """Sets mode cpr-exec, and cpr-exec-command to the VMM's own command line and `more`.

    `options` stand in place of its own, where they are given.
    """
    vm = lab.vm
    own = vm.options[:-2] if options is None else lab.words(options)
    words = [*vm.prefix, *own, *vm.options[-2:], *lab.words(more)]
    vm.query("migrate-set-parameters", {"mode": "cpr-exec", "cpr-exec-command": words})


STARTED = ("setup", "STOP", "{}", "active", "pass:2", "device")
"""The messages of a `migrate` to a file of a running guest, until the end is near."""

EXEC = (*STARTED, "completed", "EOF")
LOADED = ("setup", "{}", "active", "RESUME", "completed")
LOADED_PAUSED = ("setup", "{}", "active", "completed")
"""The messages of a `migrate-incoming`, of a guest that ran and of one that did not."""


def update(uri: str = FILE, more: str = INCOMING, options: str | None = None) -> Steps:
    """A whole cpr-exec of a running guest; afterwards we talk to the new image."""
    return [
        counting(),
        capabilities("events"),
        new_command(more, options),
        talk("migrate", {"uri": uri}, *EXEC),
        connect(),
    ]


def survives() -> Steps:
    """The new image has the guest: running, counting on, and nothing else to say."""
    return [comes_to("running"), migration({"status": "completed"}), counting(), stderr()]


def goes_on_in_the_old_image(*lines: Any) -> Steps:
    """The new image says these lines; the old one has the guest, and its PID again."""
    failure = f"the update failed: {lines[-1]}; the guest goes on in the old VMM, PID $pid"
    return [
        name_process(),
        stderr(*lines[:-1], failure),
        connect(),
        migration({"status": "failed", "error-desc": lines[-1]}),
        comes_to("running"),
        counting(),
    ]


@step
def name_process(lab: Lab) -> None:
    lab.names["pid"] = str(lab.vm.process.pid)
