"""Overlap: what a guest does during the exec, and what becomes of it where that goes wrong."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import accel_options, missing_kvm
from waiting import wait_for, wait_for_change

from benchmarks.vm import QmpError, Vm

HEARTBEAT, ORDER, DONE, SENT, STREAM = 0x8000, 0x8004, 0x8008, 0x800C, 0x8010
MISMATCHES, MISSING = 0x8014, 0x8018
SEND, SEND_STRING, SCRATCH, MEMORYLESS, FAULT = range(1, 6)

pytestmark = pytest.mark.kvm


@pytest.fixture(autouse=True)
def kvm():
    if reason := missing_kvm():
        pytest.skip(reason)


class Orders:
    """The orders guest, whose debug console is a file."""

    def __init__(self, start, folder: Path) -> None:
        self.output = folder / "debugcon"
        self.options = [
            *accel_options("overlap"),
            *("-nodefaults", "-display", "none", "-m", "64M"),
            *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-drive", "file=examples/build/orders.img,format=raw,if=floppy"),
            *("-chardev", f"file,id=out,path={self.output},append=on"),
            *("-device", "isa-debugcon,chardev=out", "-serial", "null"),
        ]
        self.vm: Vm = start(*self.options)
        self.stream_file = folder / "vmstate"
        wait_for(lambda: self.vm.u32(HEARTBEAT), "the guest runs")

    def own_command(self, *more: str) -> list[str]:
        return [*self.vm.words, "-incoming", f"file:{self.stream_file}", *more]

    def update(self, command: list[str]) -> None:
        """Starts an update to `command`; it is under way when this returns."""
        self.vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        self.vm.qmp.command("migrate", uri=f"file:{self.stream_file}")
        self.vm.qmp.wait_closed()

    def order(self, what: int) -> None:
        self.vm.write_u32(ORDER, what)

    def sent(self) -> bytes:
        return self.output.read_bytes()

    def check_sent(self) -> None:
        """All that was sent is in the file, once, in order."""
        count = self.vm.u32(SENT)
        wait_for(lambda: len(self.sent()) >= count, "all bytes are written")
        assert self.sent()[:count] == bytes(number & 0xFF for number in range(count))


def late(command: list[str], gate: Path) -> list[str]:
    """The command, which waits for the file `gate` first, so that the overlap lasts as long."""
    script = f"while ! [ -e {shlex.quote(str(gate))} ]; do sleep 0.01; done; exec "
    return ["/bin/sh", "-c", script + shlex.join(command)]


@pytest.fixture
def orders(start, tmp_path):
    return Orders(start, tmp_path)


def test_nothing_sent_is_lost_or_doubled_over_twenty_updates(orders):
    vm = orders.vm
    vm.write_u32(STREAM, 1)
    for _ in range(20):
        wait_for_change(lambda: vm.u32(SENT), "the guest sends", steps=2)
        vm.update()
    wait_for_change(lambda: vm.u32(SENT), "the guest sends", steps=2)
    vm.write_u32(STREAM, 0)
    heartbeat = vm.u32(HEARTBEAT)
    wait_for(lambda: vm.u32(HEARTBEAT) - heartbeat > 2, "the guest has stopped to send")
    orders.check_sent()
    assert vm.u32(MISMATCHES) == 0
    assert vm.stderr == ""


def test_guest_counts_on_while_the_new_image_does_not_even_start(orders, tmp_path):
    vm = orders.vm
    gate = tmp_path / "gate"
    orders.update(late(orders.own_command(), gate))
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts during the exec", steps=20)
    gate.touch()
    vm.qmp = vm.connect()
    assert vm.qmp.command("query-status") == {"status": "running", "running": True}
    assert vm.qmp.command("query-migrate")["status"] == "completed"
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts after it")


@pytest.mark.parametrize("what", [SEND, SEND_STRING, SCRATCH, MEMORYLESS])
def test_access_during_the_exec_is_held_and_then_made_once(orders, tmp_path, what):
    vm = orders.vm
    gate = tmp_path / "gate"
    orders.update(late(orders.own_command(), gate))
    orders.order(what)
    wait_for_still(lambda: vm.u32(HEARTBEAT))
    assert vm.u32(DONE) == 0
    assert orders.sent() == b""
    gate.touch()
    vm.qmp = vm.connect()
    wait_for(lambda: vm.u32(DONE) == 1, "the order is done")
    orders.check_sent()
    assert vm.u32(SENT) == {SEND: 1, SEND_STRING: 16}.get(what, 0)
    assert len(orders.sent()) == vm.u32(SENT)
    assert vm.u32(MISMATCHES) == 0
    if what == MEMORYLESS:
        assert vm.u32(MISSING) == 0xFFFFFFFF


def test_triple_fault_during_the_exec_resets_the_guest_after_it(orders, tmp_path):
    vm = orders.vm
    wait_for(lambda: vm.u32(HEARTBEAT) > 1000, "the guest counts")
    gate = tmp_path / "gate"
    orders.update(late(orders.own_command(), gate))
    orders.order(FAULT)
    before = wait_for_still(lambda: vm.u32(HEARTBEAT))
    assert vm.u32(DONE) == 1
    gate.touch()
    vm.qmp = vm.connect()
    wait_for(lambda: vm.u32(HEARTBEAT) != before, "the guest was booted again")
    assert vm.qmp.command("query-status")["running"]


def test_incoming_defer_leaves_the_guest_running_until_it_is_taken_over(orders):
    vm = orders.vm
    orders.update([*vm.words, "-incoming", "defer"])
    vm.qmp = vm.connect()
    assert vm.qmp.command("query-status")["status"] == "inmigrate"
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts in inmigrate", steps=20)
    vm.qmp.command("migrate-incoming", uri=f"file:{orders.stream_file}")
    wait_for(lambda: vm.qmp.command("query-status")["status"] == "running", "it is taken over")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
    orders.order(SEND)
    wait_for(lambda: vm.u32(DONE) == 1, "devices work")


def test_command_that_cannot_be_executed_walks_back(orders):
    vm = orders.vm
    before = vm.descriptors()
    vm.write_u32(STREAM, 1)
    for _ in range(3):
        vm.qmp.command("cpr-exec", command=["/nonexistent/vmm", "x"])
        wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "failed", "it fails")
    assert vm.qmp.command("query-status")["running"]
    assert vm.descriptors() == before
    wait_for_change(lambda: vm.u32(SENT), "the guest sends on", steps=3)
    assert vm.children() == []
    vm.update()
    wait_for_change(lambda: vm.u32(SENT), "the guest sends after an update", steps=3)
    vm.write_u32(STREAM, 0)
    heartbeat = vm.u32(HEARTBEAT)
    wait_for(lambda: vm.u32(HEARTBEAT) - heartbeat > 2, "the guest has stopped to send")
    orders.check_sent()


@pytest.mark.parametrize("options", [("-m", "32M"), ("-bogus",), ("-smp", "0")])
def test_new_vmm_that_refuses_goes_back_under_the_same_pid(orders, options):
    vm = orders.vm
    vm.write_u32(STREAM, 1)
    orders.update(orders.own_command(*options))
    vm.qmp = vm.connect()
    assert vm.process.poll() is None
    assert vm.qmp.command("query-status") == {"status": "running", "running": True}
    migration = vm.qmp.command("query-migrate")
    assert migration["status"] == "failed"
    assert migration["error-desc"]
    wait_for_change(lambda: vm.u32(SENT), "the guest sends on", steps=3)
    assert vm.stderr.count("the update failed") == 1
    assert f"PID {vm.pid}" in vm.stderr
    vm.update()  # and a good one afterwards works
    wait_for_change(lambda: vm.u32(SENT), "the guest sends after an update", steps=3)
    vm.write_u32(STREAM, 0)
    heartbeat = vm.u32(HEARTBEAT)
    wait_for(lambda: vm.u32(HEARTBEAT) - heartbeat > 2, "the guest has stopped to send")
    orders.check_sent()


class Survivor:
    """The VMM that a child has started; it is no child of the tests."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        vm.qmp = self._connect()
        self.pid = int(vm.stderr.rpartition("PID ")[2].split()[0])

    def _connect(self):
        from benchmarks.vm import Qmp

        found = []

        def connect() -> bool:
            try:
                found.append(Qmp(self.vm.socket))
            except (OSError, ValueError):
                return False
            return True

        wait_for(connect, "the monitor is back")
        return found[0]

    def end(self) -> None:
        self.vm.qmp.command("quit")
        wait_for(lambda: not Path(f"/proc/{self.pid}").exists(), "the survivor ends")


@pytest.mark.parametrize("how", ["exits", "killed"])
def test_guest_outlives_a_new_image_that_ends(orders, how):
    vm = orders.vm
    orders.vm.write_u32(STREAM, 1)
    if how == "exits":
        orders.update(["/bin/sh", "-c", "exit 3"])
        assert vm.process.wait(20) == 3
    else:
        orders.update([sys.executable, "-c", "import time; time.sleep(600)"])
        wait_for(lambda: b"time.sleep" in cmdline(vm.pid), "the new image runs")
        before = vm.u32(HEARTBEAT)
        os.kill(vm.pid, signal.SIGKILL)
        vm.process.wait(20)
        assert vm.u32(HEARTBEAT) >= before
    survivor = Survivor(vm)
    try:
        assert survivor.pid != vm.pid
        assert vm.qmp.command("query-status") == {"status": "running", "running": True}
        assert vm.qmp.command("query-migrate") == {
            "status": "failed",
            "error-desc": "the new VMM ended before it took the guest over",
        }
        assert vm.stderr.count("the update failed") == 1
        wait_for_change(lambda: vm.u32(SENT), "the guest sends on", steps=3)
        vm.qmp.command("cpr-exec")
        survivor.vm.qmp.wait_closed()
        survivor.vm.qmp = survivor._connect()
        wait_for_change(lambda: vm.u32(SENT), "the guest sends after an update", steps=3)
        vm.write_u32(STREAM, 0)
        heartbeat = vm.u32(HEARTBEAT)
        wait_for(lambda: vm.u32(HEARTBEAT) - heartbeat > 2, "the guest has stopped to send")
        orders.check_sent()
    finally:
        survivor.end()


def test_qmp_client_sees_the_end_at_once(orders, tmp_path):
    """The child keeps no descriptor of a monitor or a chardev."""
    gate = tmp_path / "gate"
    orders.update(late(orders.own_command(), gate))  # returns when the client has seen the end
    child = orders.vm.children()[0]
    kept = sorted(os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd"))
    assert not [name for name in kept if name.startswith(("socket:", str(orders.output)))]
    gate.touch()
    orders.vm.qmp = orders.vm.connect()
    wait_for(lambda: orders.vm.children() == [], "the child is reaped")


def test_overlap_that_cannot_be_is_refused_before_anything_stops(start):
    vm = start(
        *accel_options("overlap"),
        *("-nodefaults", "-display", "none", "-m", "64M"),
        *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
        *("-machine", "pc,memory-backend=ram0"),
        *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
    )
    with pytest.raises(QmpError, match="aux-ram-share=on"):
        vm.qmp.command("cpr-exec")
    assert vm.qmp.command("cpr-exec", test=True)["refusals"]
    assert vm.qmp.command("query-status")["running"]
    assert "STOP" not in [event["event"] for event in vm.qmp.events]


def test_tcg_says_that_it_has_none(start):
    vm = start.guest("heartbeat", "tcg", "-global", "migration.x-cpr-exec-overlap=on")
    with pytest.raises(QmpError, match="only -accel kvm"):
        vm.qmp.command("cpr-exec")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")


def test_death_of_the_child_is_told(orders, tmp_path):
    gate = tmp_path / "gate"
    orders.update(late(orders.own_command(), gate))
    os.kill(orders.vm.children()[0], signal.SIGKILL)
    gate.touch()
    assert orders.vm.process.wait(20) == 1
    assert "the child that ran the guest during the update has ended" in orders.vm.stderr


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for_still(read) -> int:
    """Waits until a counter stands still; returns it."""
    while True:
        before = read()
        time.sleep(0.3)
        if read() == before:
            return before


def test_seccomp_without_clone_updates_without_a_holder(start, tmp_path):
    """A container's filter may forbid clone: the update goes on, and says what it lacks."""
    script = Path(__file__).with_name("without_clone.py")
    command = [sys.executable, str(script), sys.executable, "-m", "cpr.vmm", "run"]
    vm = start.guest("heartbeat", "kvm", command=command)
    vm.update()
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
    assert "the mm holder is not used" in vm.qmp.hmp("info migrate")
