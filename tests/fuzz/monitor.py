"""A QMP client that sends every command with arguments of any kind: right, odd and wrong ones.

query-qmp-schema says which commands there are, and what they take.  Updates are among them.  The
VMM answers each, and the guest is there at the end.
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
PRACTICAL: dict[str, Any] = {
    "uri": URIS,
    "command": COMMANDS_TO_RUN,
    "cpr-exec-command": COMMANDS_TO_RUN,
    "command-line": LINES,
    "filename": ("stream", "/nonexistent/x", "/dev/full"),
    "size": (0, 1, 4096, 1 << 20),
    "multifd-channels": (1, 2, 255),
}
SETTLED = ("none", "completed", "failed", "cancelled")
SILENT = 12.0  # s, for which no VMM is, with an update of 3 s at most


def anything(chance: random.Random) -> Any:
    kind = chance.randrange(8)
    if kind < 2:
        return chance.choice(TEXTS)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind < 6:
        return chance.choice((True, False, None))
    if kind == 6:
        return [anything(chance) for _ in range(chance.randrange(3))]
    return {chance.choice(TEXTS[:5]): anything(chance) for _ in range(chance.randrange(3))}


class Schema:
    """Makes commands of what query-qmp-schema tells."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._types = {entry["name"]: entry for entry in entries}
        self._commands = [
            entry
            for entry in entries
            if entry["meta-type"] == "command" and entry["name"] not in ENDS
        ]

    def message(self, chance: random.Random) -> bytes:
        """Mostly nonsense; now and then what lets the guest run, or could update it."""
        if not chance.randrange(20):
            return b'{"execute": "cont"}\n'
        if not chance.randrange(400):
            return b'{"execute": "cpr-exec"}\n'
        command = chance.choice(self._commands)
        arguments = self._object(chance, self._types[command["arg-type"]])
        whole = {"execute": command["name"], "arguments": arguments, "id": chance.randrange(1000)}
        return json.dumps(whole).encode() + b"\n"

    def _object(self, chance: random.Random, entry: dict[str, Any]) -> dict[str, Any]:
        """Most of the members that it must have, some of the others, seldom one that it has not."""
        members = [each for each in entry["members"] if each["name"] != "x-cpr-exec-timeout"]
        optional = [each for each in members if "default" in each]
        chosen = [each for each in members if "default" not in each and chance.randrange(12)]
        chosen += chance.sample(optional, min(len(optional), chance.randrange(4)))
        result = {each["name"]: self._value(chance, each["type"], each["name"]) for each in chosen}
        for variant in entry.get("variants", ()):
            if variant["case"] == result.get(entry["tag"]) and chance.randrange(12):
                result |= self._object(chance, self._types[variant["type"]])
        if not chance.randrange(20):
            result[chance.choice(TEXTS)] = anything(chance)
        return result

    def _value(self, chance: random.Random, name: str, member: str) -> Any:
        """Of the type `name`, mostly; what `member` would be in practice, often."""
        if not chance.randrange(8):
            return anything(chance)
        if member in PRACTICAL and chance.randrange(3):
            return chance.choice(PRACTICAL[member])
        entry = self._types[name]
        meta = entry["meta-type"]
        if meta == "enum":
            return chance.choice(entry["values"])
        if meta == "array":
            count = chance.randrange(4)
            return [self._value(chance, entry["element-type"], member) for _ in range(count)]
        if meta == "object":
            return self._object(chance, entry)
        if meta == "alternate":
            return self._value(chance, chance.choice(entry["members"])["type"], member)
        if name == "int":
            return chance.choice((chance.randrange(100), chance.choice(NUMBERS)))
        return {"bool": chance.random() < 0.5, "str": chance.choice(TEXTS)}.get(name)


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
        self.schema = Schema(self.vm.qmp.command("query-qmp-schema"))
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
                last = fuzzed.schema.message(chance)
                fuzzed.send(last)
            fuzzed.check()
        except Exception as error:
            print(f"qmp on {accel}, seed {seed}, after {fuzzed.commands}: {error}; {last[:500]!r}")
            print(fuzzed.vm.stderr[-3000:])
            return False
    print(f"qmp: {fuzzed.commands} commands and {fuzzed.updates} updates on {accel}")
    return True
