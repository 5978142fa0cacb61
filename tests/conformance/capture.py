"""What one cpr-exec of a VMM leaves for its new image, taken so that rows can damage it.

The command of that update is `sleep`, which touches nothing: the descriptors and the state are
read from it through /proc.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from harness.qmp import Closed

from . import cpr_state
from .lab import STATE_VARIABLE, Lab
from .match import Mismatch
from .process import Process
from .steps import FILE, counting, guest, until
from .stream import Stream

if TYPE_CHECKING:
    from .target import Target

SLEEP = ["sleep", "600"]
HIGH = 500
"""Our own descriptors go above this, out of the way of those that a VMM is to have."""


class Capture:
    """The CPR state's entries, the content of the memfds by number, the stream, the counter."""

    def __init__(
        self, entries: list[cpr_state.Entry], contents: dict[int, bytes], stream: bytes, count: int
    ) -> None:
        self.entries = entries
        self.contents = contents
        self.stream = Stream(stream)
        self.count = count

    @property
    def ram_fd(self) -> int:
        return next(fd for name, _, fd in self.entries if name == "ram0")


def take(target: Target) -> Capture:
    """Updates a counting guest.  Raises Mismatch where the VMM does not come that far."""
    with target.lab() as lab:
        lab.boot("vm", guest())
        counting()(lab)
        exec_into_sleep(lab)
        process = lab.vm.process
        entries = cpr_state.decode(read_state(process))
        contents = {fd: read_file(process, fd) for _, _, fd in entries}
        stream = lab.path("$dir/state").read_bytes()
        return Capture(entries, contents, stream, lab.vm.count)


def exec_into_sleep(lab: Lab, uri: str = FILE, command: list[str] = SLEEP) -> None:
    """Updates the VMM to `sleep`, or to a `command` that becomes it."""
    vm = lab.vm
    wanted = {"mode": "cpr-exec", "cpr-exec-command": lab.fill(command)}
    vm.query("migrate-set-parameters", wanted)
    vm.qmp.send("migrate", {"uri": lab.fill(uri)})
    try:
        while True:
            message = vm.qmp.read()
            if "error" in message:
                raise Mismatch(f"migrate: {message['error']}")
    except Closed:
        pass
    if not until(lambda: _has_become(vm.process, "sleep")):
        raise Mismatch(f"no exec: the command line is {vm.process.command_line()}")


def _has_become(process: Process, name: str) -> bool:
    """Whether the program is `name`, and past its own start: it sleeps."""
    return process.field("Name") == name and process.field("State").startswith("S")


def state_number(process: Process) -> int:
    """The number in the environment variable of an exec'd process."""
    for word in process.environment():
        name, _, value = word.partition("=")
        if name == STATE_VARIABLE:
            return int(value)
    raise Mismatch(f"{STATE_VARIABLE} is not in the environment")


def read_state(process: Process) -> bytes:
    """The CPR state of an exec'd process."""
    return read_file(process, state_number(process))


def read_file(process: Process, fd: int) -> bytes:
    ours = process.open_descriptor(fd, os.O_RDONLY)
    with open(ours, "rb") as file:
        return file.read()


def memfd(lab: Lab, content: bytes) -> int:
    """A memfd of ours with `content`; the lab closes it."""
    low = os.memfd_create("conformance")
    with open(low, "r+b", buffering=0) as file:
        file.write(content)
        file.seek(0)
        high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, HIGH)
    lab.fds.append(high)
    return high
