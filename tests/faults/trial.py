"""One fault in one step of one update, and what became of the guest."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from harness.qmp import QmpError
from harness.vm import VMM, Vm
from waiting import is_listening, wait_for, wait_for_change

from cpr.faults import HANG, VARIABLE
from faults.steps import CONT, ENDED, MOVED, NEW, OLD, Row

HEARTBEAT = 0x8000
RAM = "16M"
DEADLINE_MS = {True: 3000, False: 60_000}  # with a hang
SHARED = ["-object", f"memory-backend-memfd,id=ram0,size={RAM},share=on"]
PRIVATE = ["-object", f"memory-backend-ram,id=ram0,size={RAM}"]
SETTLED = ("failed", "completed", "cancelled", "none")
JOIN = 30.0  # s
LEFT = ("cpr-exec-",)  # what the names of temporary folders begin with


class Trial:
    """A VM whose update has a fault; `run` returns what of the outcomes it was."""

    def __init__(self, start: Any, accel: str, row: Row, fault: str, folder: Path) -> None:
        self._start = start
        self.row, self.fault = row, fault
        self.folder = folder
        self.armed = folder / "fault"
        self.environment = {**os.environ, VARIABLE: str(self.armed)}
        ram = PRIVATE if row.way == "staging" else SHARED
        self.words = [
            *("-nodefaults", "-display", "none", "-accel", accel, "-m", RAM, *ram),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-drive", "file=examples/build/timer.img,format=raw,if=floppy"),
            *("-global", f"migration.x-cpr-exec-timeout={DEADLINE_MS[fault == HANG]}"),
            *("-chardev", "null,id=first", "-serial", "chardev:first"),
        ]
        self.vm: Vm = start(*self.words, "-name", "old", env=self.environment)
        self.first_pid = self.vm.pid
        self.target: Vm | None = None
        self.counted = 0

    def run(self) -> str:
        vm, way = self.vm, self.row.way
        wait_for(lambda: self.count(vm) > 0, "the guest counts")
        self.counted = self.count(vm)
        self.armed.write_text(f"{self.row.step} {self.fault}")
        getattr(self, f"_{way.replace(' ', '_')}")()
        wait_for(lambda: not self.armed.exists(), f"the step {self.row.step} is come to")
        if self.fault == HANG and self._is_let_go():
            Path(f"{self.armed}.go").touch()
        outcome = self._settle()
        self._check(outcome)
        return outcome

    def _is_let_go(self) -> bool:
        """Nobody ends an image that hangs while it has the guest, nor one that has no deadline."""
        return self.row.outcome(HANG) != MOVED and self.row.way != "rehearsal"

    # The ways.

    def _command(self, *more: str) -> list[str]:
        return [*VMM, *self.vm.words[len(VMM) :], "-name", "new", *more]

    def _send(self, name: str, **arguments: Any) -> None:
        """What the VMM answers, if it does, does not matter here: `ask` connects anew."""
        self.vm.qmp.send(name, **arguments)
        self.vm.qmp.close()

    def _early(self) -> None:
        self._send("cpr-exec", command=self._command())

    def _migrate(self, command: list[str]) -> None:
        stream = f"file:{self.folder}/stream"
        command = [*command, "-incoming", stream]
        self.vm.ask("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        self._send("migrate", uri=stream)

    def _late(self) -> None:
        self._migrate(self._command())

    def _refused(self) -> None:
        self._send("cpr-exec", command=self._command("-smp", "2"))

    def _refused_late(self) -> None:
        self._migrate(self._command("-no-such-option"))

    def _staging(self) -> None:
        self.vm.ask("migrate-set-parameters", x_cpr_ram_staging=True)
        self._migrate(self._command())

    def _rehearsal(self) -> None:
        self._send("cpr-exec", command=self._command(), test=True)

    def _reboot(self) -> None:
        self.vm.ask("migrate-set-parameters", mode="cpr-reboot")
        self._send("migrate", uri=f"file:{self.folder}/stream")

    def _transfer(self) -> None:
        main, cpr = f"{self.folder}/main", f"{self.folder}/cpr"
        channels = [
            {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
            for kind, path in (("main", main), ("cpr", cpr))
        ]
        incoming = [word for each in channels for word in ("-incoming", json.dumps(each))]

        def start() -> None:
            try:
                self.target = self._start(
                    *self.words, *incoming, "-name", "new", env=self.environment
                )
            except RuntimeError:  # the fault is the target's end
                pass

        self._thread = threading.Thread(target=start)
        self._thread.start()
        wait_for(lambda: is_listening(cpr), "the target listens")
        self.vm.ask("migrate-set-parameters", mode="cpr-transfer")
        self._send("migrate", channels=channels)

    # What became of it.

    @staticmethod
    def count(vm: Vm) -> int:
        return int(
            vm.ask("human-monitor-command", command_line=f"xp /1xw {HEARTBEAT}").split()[1], 16
        )

    def _settle(self) -> str:
        if self.row.way == "transfer":
            return self._settle_transfer()
        vm = self.vm
        if self.row.way == "reboot" and self.row.outcome(self.fault) == NEW:
            wait_for(lambda: vm.ask("query-migrate")["status"] == "completed", "it is written")
            vm.ask("quit")
            stream = f"file:{self.folder}/stream"
            self.target = self._start(*self.words, "-incoming", stream, "-name", "new")
            wait_for(lambda: self.target.ask("query-status")["running"], "the guest runs")
            return NEW
        if self.row.outcome(self.fault) == ENDED:
            wait_for(lambda: not vm.processes(), "all have ended")
            return ENDED
        wait_for(lambda: len(vm.processes()) == 1 and self._is_settled(), "it is settled")
        vm.follow()
        if vm.ask("query-name").get("name") == "new":
            assert vm.pid == self.first_pid
            return NEW
        return OLD if vm.pid == self.first_pid else MOVED

    def _is_settled(self) -> bool:
        if self.vm.ask("query-migrate").get("status", "none") not in SETTLED:
            return False
        return len(self.vm.processes()) == 1

    def _settle_transfer(self) -> str:
        vm, expected = self.vm, self.row.outcome(self.fault)
        self._thread.join(JOIN)
        if expected == ENDED:
            wait_for(lambda: not vm.processes(), "the source has ended")
            wait_for(lambda: self._waits_or_has_ended(), "the target waits on, or has ended")
            return ENDED
        if (target := self.target) is not None and expected == NEW:
            wait_for(lambda: target.ask("query-status")["running"], "the guest runs")
            wait_for(lambda: not self._source_runs(), "the source does not run it too")
            return NEW
        wait_for(lambda: vm.ask("query-migrate").get("status") in SETTLED, "it is settled")
        if vm.ask("query-status")["status"] == "postmigrate":
            wait_for(lambda: self.target is None or not self.target.processes(), "it has ended")
            wait_for(self._goes_on, "the lock of a target that has no memory any more is gone")
            return CONT
        return CONT if expected == CONT else OLD

    def _source_runs(self) -> bool:
        try:
            return bool(self.vm.processes() and self.vm.ask("query-status")["running"])
        except (RuntimeError, OSError):  # it has ended
            return False

    def _goes_on(self) -> bool:
        try:
            self.vm.ask("cont")
        except QmpError as error:
            assert "lock" in str(error), error
            return False
        return True

    def _waits_or_has_ended(self) -> bool:
        """Where the source has sent its CPR state only, the target goes on waiting, as QEMU's."""
        target = self.target
        try:
            return target is None or target.ask("query-status")["status"] == "inmigrate"
        except RuntimeError:
            return not target.processes()

    def _check(self, outcome: str) -> None:
        """What is so whatever became of it."""
        vm = self.target if self.target is not None and outcome == NEW else self.vm
        left = [name for name in os.listdir(vm.directory) if name.startswith(LEFT)]
        assert not left, f"left behind: {left}"
        if outcome == ENDED:
            return
        status = vm.ask("query-status")
        assert status["running"], status
        now = wait_for_change(lambda: self.count(vm), "the guest counts on")
        assert 0 <= now - self.counted < 1 << 31, "its counter has gone back"
        wait_for(lambda: not vm.children(), "no child is left")
        told = vm.ask("query-migrate")
        if outcome in (OLD, MOVED) and self.row.way != "rehearsal":
            assert told["status"] == "failed" and told["error-desc"], told
        vm.ask("quit")
