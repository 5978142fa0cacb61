"""New programs for updates: one that waits, and some that fail, at a moment of their own."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from harness.vm import ROOT, Vm
from waiting import wait_for

from .guest import SECONDS, own_words

# Does one more step when the guest has been loaded, before it takes it over.
AFTER_LOAD = """
import os, sys, time
sys.path.insert(0, {root!r})
from cpr.errors import MigrationError
from cpr.migration import loadvm
load = loadvm.Loader.load
def load_and_fail(loader, *arguments, complete=True, **named):
    state = load(loader, *arguments, complete=complete, **named)
    if complete:
        {step}
    return state
loadvm.Loader.load = load_and_fail
from cpr.vmm.main import main
sys.exit(main(sys.argv[1:]))
"""
STEPS = {
    "refuses-loaded": "raise MigrationError('not this guest')",
    "dies-loaded": "os.kill(os.getpid(), 9)",
    "hangs-loaded": "time.sleep(1000)",
}
FAILURES = ("refuses", "dies", *STEPS)
TIMEOUT_MS = 20_000  # the program's start takes seconds in the VM


def plain_words(vm: Vm) -> list[str]:
    """The VMM's options as a user would give them again."""
    words = own_words(vm)
    options = words[words.index("run") + 1 :]
    if "-incoming" in options:
        at = options.index("-incoming")
        del options[at : at + 2]
    return options


def failing(vm: Vm, how: str) -> list[str]:
    """A command whose program knows the protocol, and fails in this way."""
    words = [sys.executable, "-m", "cpr.vmm", "run", *plain_words(vm)]
    if how == "refuses":
        return [*words, "-m", "32M"]
    if how == "dies":
        return ["/bin/sh", "-c", '[ -n "$CPR_LIVE" ] && kill -9 $$; exec "$@"', "sh", *words]
    code = AFTER_LOAD.format(root=str(ROOT), step=STEPS[how])
    return [sys.executable, "-c", code, "run", *plain_words(vm)]


def update(vm: Vm, way: str, command: list[str]) -> None:
    """Begins an update by `command`, early or late."""
    if way == "early":
        vm.qmp.command("cpr-exec", command=command)
        return
    stream = f"file:{vm.directory}/stream"
    words = [*command, "-incoming", stream]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=words)
    vm.qmp.send("migrate", uri=stream)


def wait_for_failure(vm: Vm, count: int) -> None:
    """Waits until `count` updates have failed and one process has the guest; talks to that."""
    wait_for(lambda: vm.stderr.count("guest goes on in the old VMM") >= count, "it fails", SECONDS)
    wait_for(lambda: len(vm.processes()) == 1, "one process is left", SECONDS)
    vm.follow()
    vm.qmp.close()
    vm.qmp = vm.connect()


@contextmanager
def waiting_new_image(vm: Vm) -> Iterator[Callable[[], None]]:
    """An early update whose new program does not start until what is yielded is called."""
    gate = Path(f"{vm.directory}/gate")
    wait = f'while [ -n "$CPR_LIVE" ] && ! [ -e {shlex.quote(str(gate))} ]; do sleep 0.1; done'
    words = [sys.executable, "-m", "cpr.vmm", "run", *plain_words(vm)]
    vm.qmp.command("cpr-exec", command=["/bin/sh", "-c", f'{wait}; exec "$@"', "sh", *words])

    def is_waiting() -> bool:
        return psutil.Process(vm.pid).exe() == os.path.realpath("/bin/sh")

    wait_for(is_waiting, "the new program waits", SECONDS)

    def finish() -> None:
        gate.touch()
        vm.reconnect()

    yield finish
    gate.unlink(missing_ok=True)
