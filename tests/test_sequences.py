"""Sequences of whatever can be done to a VM, in any order: the guest is there after each of them.

The default run takes a few short ones; `make states` takes many long ones.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import MISSING, ROOT
from failing import bad
from harness.qmp import QmpError
from harness.vm import VMM, Vm
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from waiting import wait_for, wait_for_change

CHURN_MISMATCHES, CHURN_PAGES = 0x9020, 0x9028
LONG = int(os.environ.get("MANY_STATES", "0"))
SETTLED = ("none", "completed", "failed", "cancelled")
FAIL_EARLY = ("exit", "die", "die-after-hello", "garbage", "die-before-commit", "refuse")
FAIL_LATE = (["false"], ["/nonexistent/vmm"], ["sh", "-c", "kill -9 $$"])
HANGS = ("hang", "hang-after-hello", "hang-before-commit")
SETTLE = 60.0  # s


class Sequences(RuleBasedStateMachine):
    """One VM, whose guest churns; `pages` is what it had done when it was last looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.vm: Vm | None = None

    @initialize(accel=some.sampled_from([name for name in MISSING if MISSING[name]() is None]))
    def start(self, accel: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="cpr-sequence-")
        self.serial = f"{self.folder.name}/serial"
        self.vm = Vm(
            *("-nodefaults", "-display", "none", "-accel", accel, "-m", "64M"),
            *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-drive", f"file={ROOT}/examples/build/churn.img,format=raw,if=floppy"),
            *("-chardev", f"socket,id=com1,path={self.serial},server=on,wait=off"),
            *("-serial", "chardev:com1", "-global", "migration.x-cpr-exec-timeout=20000"),
        )
        self.running, self.boots, self.pages = True, False, 0
        wait_for(lambda: self.vm.u64(CHURN_PAGES) > 0, "the guest churns")
        self.names = self._names()

    def _names(self) -> Counter[str]:
        """What the VMM has open, but for the clients that may be connected."""
        names = [name.partition(":[")[0] for name in self.vm.descriptors().values()]
        return Counter(name for name in names if name != "socket")

    # What can be done.

    @rule()
    def update_early(self) -> None:
        self.vm.ask("cpr-exec")
        self._settle("completed")

    @rule()
    def update_late(self) -> None:
        stream = f"file:{self.folder.name}/stream"
        self._late([*VMM, *self.vm.words[len(VMM) :], "-incoming", stream])
        self._settle("completed")

    @rule(kind=some.sampled_from(FAIL_EARLY))
    def fail_early(self, kind: str) -> None:
        self.vm.ask("cpr-exec", command=bad(kind))
        self._settle("failed")

    @rule(command=some.sampled_from(FAIL_LATE))
    def fail_late(self, command: list[str]) -> None:
        self._late(command)
        self._settle("failed")

    @rule(kind=some.sampled_from(HANGS), kills=some.booleans())
    def cancel_or_kill(self, kind: str, kills: bool) -> None:
        """The new program does nothing; it is killed, or the update is cancelled."""
        self.vm.ask("cpr-exec", command=bad(kind))
        wait_for(lambda: len(self._processes(kind)) == 1, "the new program is there")
        if kills:
            with suppress(psutil.NoSuchProcess):
                self._processes(kind)[0].kill()
        else:
            self.vm.ask("migrate_cancel")
        self._settle("failed" if kills else "cancelled", True)

    @rule()
    def rehearse(self) -> None:
        assert self.vm.ask("cpr-exec", test=True)["refusals"] == []

    @rule()
    def update_twice(self) -> None:
        """The second is refused, or comes when the first is done."""
        self.vm.ask("cpr-exec")
        with suppress(QmpError):
            self.vm.ask("cpr-exec")
        self._settle("completed")

    @rule()
    def stop(self) -> None:
        self.vm.ask("stop")
        self.running = False

    @rule()
    def cont(self) -> None:
        self.vm.ask("cont")
        self.running = True

    @rule()
    def reset(self) -> None:
        self.vm.ask("system_reset")
        self.pages = 0
        self.boots = not self.running  # it sets its counter when it runs
        if self.running:
            wait_for(lambda: self.vm.u64(CHURN_PAGES) > 0, "the guest churns anew")

    @rule()
    def client(self) -> None:
        """Connects to the serial port, says something, and goes.

        The guest reads nothing: who comes after one whose words still wait is not served yet.
        """
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect(self.serial)
                sock.sendall(b"hello")

    def _late(self, command: list[str]) -> None:
        self.vm.ask("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        self.vm.ask("migrate", uri=f"file:{self.folder.name}/stream")

    @staticmethod
    def _processes(kind: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if words[2:4] == [kind, "run"] and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    # What is so after each.

    def _settle(self, status: str, or_failed: bool = False) -> None:
        vm = self.vm

        def is_settled() -> bool:
            return self._status() in SETTLED and len(vm.processes()) == 1

        wait_for(is_settled, "the update is done", SETTLE)
        vm.follow()
        assert self._status() in ((status, "failed") if or_failed else (status,)), vm.stderr
        if vm.ask("query-status")["status"] == "postmigrate":  # it was stopped before
            assert not self.running
            vm.ask("cont")
            vm.ask("stop")

    def _status(self) -> str:
        return str(self.vm.ask("query-migrate").get("status", "none"))

    @invariant()
    def the_guest_is_there(self) -> None:
        vm = self.vm
        if vm is None:
            return
        assert len(vm.processes()) == 1
        assert vm.ask("query-status")["running"] == self.running
        if self.running:
            wait_for_change(lambda: vm.u64(CHURN_PAGES), "the guest churns on")
            self.boots = False
        now = vm.u64(CHURN_PAGES)
        if not self.boots:
            assert now >= self.pages, "its counter has gone back"
            self.pages = now
        assert vm.u64(CHURN_MISMATCHES) == 0
        wait_for(lambda: not vm.children(), "no child is left")
        wait_for(lambda: self._names() == self.names, "descriptors are what they were")
        left = {*os.listdir(vm.directory)} - {"qmp.sock", "stderr"}
        assert not left, left
        assert {*os.listdir(self.folder.name)} <= {"serial", "stream"}

    def teardown(self) -> None:
        if self.vm is not None:
            assert "Traceback" not in self.vm.stderr
            with self.vm, self.folder:
                self.vm.ask("quit")
                wait_for(lambda: not self.vm.processes(), "it ends")
                assert not Path(self.serial).exists()


Sequences.TestCase.settings = settings(
    max_examples=LONG or 4,
    stateful_step_count=30 if LONG else 7,
    deadline=None,
    database=None,
    derandomize=not LONG,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class TestSequences(Sequences.TestCase):  # type: ignore[valid-type, misc]
    pytestmark = [pytest.mark.timeout(7200 if LONG else 180), pytest.mark.usefixtures("guests")]
