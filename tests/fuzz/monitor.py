"""A QMP client that sends every command with arguments of any kind, right and wrong ones.

The table of the monitor's own commands says what there is.  Updates are among them.  The VMM
answers each, and the guest is there at the end.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from conftest import ROOT  # noqa: E402
from harness.qmp import Closed  # noqa: E402
from harness.vm import Vm  # noqa: E402
from waiting import wait_for  # noqa: E402

from cpr.migration.parameters import Parameters  # noqa: E402
from cpr.monitor.commands import COMMANDS  # noqa: E402

ENDS = ("quit", "system_powerdown", "migrate-incoming")  # what ends the VM, or only answers no
TEXTS = ("", "a", "on", "run", "\0", "é\ud800", "x" * 5000, "-1", "0x", "cpr-exec", "normal")
URIS = ("file:stream", "file:/nonexistent/x", "unix:nobody", "tcp:127.0.0.1:1", "fd:77", "bogus:x")
LINES = (
    "info status",
    "info registers",
    "x /8xb 0x7c00",
    "xp /1xg 0x8000",
    "p $eip*3",
    "help",
    "((",
)
NUMBERS = (0, 1, -1, 255, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 70, 1.5)
COMMANDS_TO_RUN: tuple[list[str], ...] = (
    ["/nonexistent"],
    ["false"],
    [],
    ["run"],
    [""],
    ["\0"],
    ["true", "run"],
)
SETTLED = ("none", "completed", "failed", "cancelled")
SILENT = 12.0  # s, for which no VMM is, with an update of 3 s at most


def value(chance: random.Random, name: str = "") -> Any:
    """Anything, often what `name` would be."""
    kind = chance.randrange(10)
    if kind < 3:
        if name == "uri":
            return chance.choice(URIS)
        if name == "command":
            return chance.choice(COMMANDS_TO_RUN)
        if name == "command-line":
            return chance.choice(LINES)
    if kind < 5:
        return chance.choice(TEXTS)
    if kind < 7:
        return chance.choice(NUMBERS)
    if kind == 7:
        return chance.choice((True, False, None))
    if kind == 8:
        return [value(chance) for _ in range(chance.randrange(3))]
    return {chance.choice(TEXTS[:5]): value(chance) for _ in range(chance.randrange(3))}


def parameters(chance: random.Random) -> dict[str, Any]:
    names = [name for name in Parameters().names() if name != "x-cpr-exec-timeout"]
    chosen = chance.sample(names, chance.randrange(1, 4))
    return {name: value(chance) for name in chosen}


def message(chance: random.Random) -> bytes:
    """Mostly nonsense; now and then what lets the guest run, and an update that could go well."""
    if not chance.randrange(20):
        return b'{"execute": "cont"}\n'
    if not chance.randrange(400):
        return b'{"execute": "cpr-exec"}\n'
    command = chance.choice([each for each in COMMANDS if each.qmp and each.qmp not in ENDS])
    arguments: dict[str, Any]
    if command.qmp == "migrate-set-parameters":
        arguments = parameters(chance)
    else:
        arguments = {
            each.name: value(chance, each.name) for each in command.arguments if chance.randrange(8)
        }
    if not chance.randrange(20):
        arguments[chance.choice(TEXTS)] = value(chance)
    whole = {"execute": command.qmp, "arguments": arguments, "id": chance.randrange(1000)}
    return json.dumps(whole).encode() + b"\n"


class Fuzzed:
    """A VM whose monitor is fuzzed."""

    def __init__(self, accel: str, folder: str) -> None:
        self.vm = Vm(
            *("-nodefaults", "-display", "none", "-accel", accel, "-m", "16M"),
            *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-drive", f"file={ROOT}/examples/build/heartbeat.img,format=raw,if=floppy"),
            *("-global", "migration.x-cpr-exec-timeout=3000"),
            timeout=SILENT,
            cwd=folder,
        )
        self.commands = self.updates = 0

    def __enter__(self) -> Fuzzed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.vm.close()

    def send(self, data: bytes) -> None:
        """One command, to its answer, or to the end of the connection by an update."""
        vm = self.vm
        self.commands += 1
        try:
            vm.qmp.send_raw(data)
            while "event" in vm.qmp.read():
                pass
        except Closed:
            self.updates += 1
            vm.qmp.close()
            vm.qmp = vm.connect()

    def check(self) -> None:
        """The VMM is there, and what stops the guest is undone."""
        vm = self.vm

        def is_settled() -> bool:
            now = vm.ask("query-migrate").get("status", "none")
            return now in SETTLED and len(vm.processes()) == 1

        wait_for(is_settled, "one process has the VM")
        assert vm.ask("query-status")["status"] != "internal-error"
        assert "Traceback" not in vm.stderr, vm.stderr


def fuzz(accel: str, seconds: float, seed: int, least: int = 0) -> bool:
    """For so long, and at least so many commands."""
    chance, end = random.Random(f"{accel} {seed}"), time.monotonic() + seconds
    last = b""
    with TemporaryDirectory(prefix="cpr-fuzz-") as folder, Fuzzed(accel, folder) as fuzzed:
        try:
            while time.monotonic() < end or fuzzed.commands < least:
                last = message(chance)
                fuzzed.send(last)
            fuzzed.check()
        except Exception as error:
            print(f"qmp on {accel}, seed {seed}, after {fuzzed.commands}: {error}; {last[:500]!r}")
            print(fuzzed.vm.stderr[-3000:])
            return False
    print(f"qmp: {fuzzed.commands} commands and {fuzzed.updates} updates on {accel}")
    return True
