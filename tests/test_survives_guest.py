"""A guest across a real exec of its VMM: same process, same RAM, nothing lost, nothing doubled."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
from collections import Counter

import pytest
from conftest import LATE, MISSING, accel_options
from harness.qmp import QmpError
from harness.vm import HEARTBEAT, Vm
from waiting import wait_for, wait_for_change

KVM_DESCRIPTORS = {"/dev/kvm": 1, "anon_inode:kvm-vm": 1, "anon_inode:kvm-vcpu": 1}
INTERRUPTS = 0x8004
CHURN_ROUND, CHURN_MISMATCHES, CHURN_PAGES = 0x9018, 0x9020, 0x9028
SMP_COUNTERS, SMP_PASSES, SMP_TOKEN = (0x8000, 0x8004), 0x8008, 0x8010


@pytest.fixture(params=["kvm", LATE, "tcg"])
def accel(request):
    reason = MISSING["kvm" if request.param == LATE else request.param]()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def memfd_inode(vm: Vm) -> int:
    return os.stat(vm.ram_path()).st_ino


def ahead(after: int, before: int) -> int:
    """How far a 32-bit counter that may wrap has gone on; negative if it went back."""
    step = (after - before) & 0xFFFFFFFF
    return step - (1 << 32) if step >> 31 else step


def test_pid_ram_and_counter_go_on(start, accel):
    vm = start.guest("heartbeat", accel)
    inode = memfd_inode(vm)
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    for _ in range(3):
        before = vm.u32(HEARTBEAT)
        vm.update()
        assert vm.qmp.command("query-status") == {"status": "running", "running": True}
        after = wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
        assert ahead(after, before) > 0
        assert vm.process.poll() is None
        assert memfd_inode(vm) == inode


def test_tenth_update_is_as_good_as_the_first(start, accel):
    vm = start.guest("heartbeat", accel)
    last = vm.u32(HEARTBEAT)
    vm.update()
    settle(vm)
    descriptors = sorted(map(anonymous, vm.descriptors().values()))
    for _ in range(9):
        vm.update()
        counter = wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
        assert ahead(counter, last) > 0
        last = counter
    settle(vm)
    assert sorted(map(anonymous, vm.descriptors().values())) == descriptors
    assert vm.qmp.command("query-status")["status"] == "running"
    assert vm.complaints == ""


def settle(vm: Vm) -> None:
    """Waits until the old image has ended, and the new one has given up what it knew of it."""
    wait_for(lambda: not vm.children(), "the old image is reaped")
    wait_for(lambda: "anon_inode:[pidfd]" not in vm.descriptors().values(), "its pidfd is closed")


def anonymous(target: str) -> str:
    """A descriptor's target without the numbers that differ between two of the same kind."""
    return re.sub(r"\[\d+\]|:\d+$", "", target)


def test_exactly_the_expected_descriptors(start, accel):
    vm = start.guest("heartbeat", accel)
    before = vm.descriptors()
    vm.update()
    settle(vm)
    after = vm.descriptors()
    preserved = {fd: name for fd, name in before.items() if name.startswith("/memfd:")}
    assert {name.split()[0] for name in preserved.values()} == {
        "/memfd:memory-backend-memfd",
        "/memfd:pc.bios",
        "/memfd:pc.rom",
    }
    found = {fd: name for fd, name in after.items() if name.startswith("/memfd:")}
    assert sorted(found.values()) == sorted(preserved.values())
    if accel == LATE:
        assert found == preserved, "an exec keeps their numbers"
    for found in (before, after):
        others = [anonymous(name) for name in found.values() if not name.startswith("/memfd:")]
        assert Counter(others) == Counter(
            {
                "/dev/null": 2,  # stdin and stdout
                str(vm.stderr_path): 1,
                "anon_inode:[eventpoll]": 1,  # the main loop's
                "anon_inode:[eventfd]": 1,
                "socket:": 2,  # the QMP listener and its client
                "pipe:": 2,  # signals
                **(KVM_DESCRIPTORS if accel != "tcg" else {}),
            }
        )


def test_all_descriptors_but_the_standard_ones_are_close_on_exec(start, accel):
    vm = start.guest("heartbeat", accel)
    for _ in range(2):
        for fd in vm.descriptors():
            with open(f"/proc/{vm.pid}/fdinfo/{fd}") as file:
                flags = int(re.findall(r"flags:\s*(\d+)", file.read())[0], 8)
            assert fd < 3 or flags & os.O_CLOEXEC, vm.descriptors()[fd]
        vm.update()


def registers(vm: Vm) -> str:
    return vm.qmp.hmp("info registers")


def test_registers_of_a_halted_vcpu_are_identical(start, accel):
    vm = start.guest("halt", accel)
    wait_for(lambda: vm.u32(HEARTBEAT) != 0, "the guest halts")
    before = registers(vm)
    assert "HLT=1" in before
    vm.update()
    assert registers(vm) == before


def test_churn_finds_no_mismatch_over_updates(start, accel):
    vm = start.guest("churn", accel)
    for _ in range(8):
        wait_for_change(lambda: vm.u64(CHURN_PAGES), "the guest writes pages")
        vm.update()
        assert vm.u64(CHURN_MISMATCHES) == 0
    wait_for_change(lambda: vm.u64(CHURN_ROUND), "a whole round is checked", steps=2)
    assert vm.u64(CHURN_MISMATCHES) == 0


class Console:
    """The console guest with COM1 on its stdio."""

    def __init__(self, start, accel: str, *arguments: str) -> None:
        self.vm = start(
            *accel_options(accel),
            *("-nodefaults", "-display", "none", "-m", "64M"),
            *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-drive", "file=examples/build/console.img,format=raw,if=floppy"),
            *("-serial", "stdio"),
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.line() == "ready"

    def type(self, text: str) -> None:
        self.vm.process.stdin.write(text.encode())
        self.vm.process.stdin.flush()

    def line(self) -> str:
        return self.vm.process.stdout.readline().decode().rstrip("\r\n")


def test_line_typed_before_is_answered_after(start, accel):
    console = Console(start, accel)
    console.type("first\n")
    assert console.line() == "1: first"
    console.vm.qmp.command("stop")
    console.type("second\n")
    console.vm.update()
    console.vm.qmp.command("cont")
    assert console.line() == "2: second"


def test_line_typed_in_two_halves_around_the_update(start, accel):
    console = Console(start, accel)
    console.type("half")
    wait_for(lambda: console.vm.u32(0x8008) & 0xFFFF == 4, "the guest has half a line")
    console.vm.update()
    console.type("way\n")
    assert console.line() == "1: halfway"


def test_nothing_typed_during_updates_is_lost_or_doubled(start, accel):
    console = Console(start, accel)
    for number in range(1, 11):
        console.type(f"line {number}\n")
        console.vm.update()
    answers = [console.line() for _ in range(10)]
    assert answers == [f"{number}: line {number}" for number in range(1, 11)]


@pytest.mark.parametrize("guest", ["timer", "lapic-timer"])
def test_timer_interrupts_go_on(start, accel, guest):
    vm = start.guest(guest, accel)
    for _ in range(3):
        wait_for_change(lambda: vm.u32(INTERRUPTS), "timer interrupts", steps=5)
        before = vm.u32(INTERRUPTS)
        vm.update()
        wait_for_change(lambda: vm.u32(INTERRUPTS), "timer interrupts after", steps=5)
        assert ahead(vm.u32(INTERRUPTS), before) >= 5


def test_two_vcpus_and_their_token(start, accel):
    vm = start.guest("smp", accel)
    for _ in range(5):
        for counter in SMP_COUNTERS:
            wait_for_change(functools.partial(vm.u32, counter), "both vCPUs count")
        passes = wait_for_change(lambda: vm.u32(SMP_PASSES), "the token is passed")
        vm.update()
        assert ahead(vm.u32(SMP_PASSES), passes) >= 0
        wait_for_change(lambda: vm.u32(SMP_PASSES), "the token is passed on", steps=3)
    vm.qmp.command("stop")
    assert vm.u32(SMP_TOKEN) in (0, 1)


@pytest.mark.parametrize("state", ["paused", "prelaunch"])
def test_a_guest_that_stood_still_still_does(start, accel, state):
    vm = start.guest("heartbeat", accel, *(["-S"] if state == "prelaunch" else []))
    if state == "paused":
        wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
        vm.qmp.command("stop")
    vm.update()
    assert vm.qmp.command("query-status") == {"status": state, "running": False}
    vm.qmp.command("cont")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts after cont")


def test_failed_exec_walks_back(start, accel):
    vm = start.guest("heartbeat", accel)
    before = vm.descriptors()
    vm.qmp.command(
        "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
    )
    vm.qmp.command("cpr-exec", command=["/nonexistent/vmm", "x"])
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "failed", "the exec fails")
    answer = vm.qmp.command("query-migrate")
    assert answer["error-desc"] == "execvp /nonexistent/vmm failed: No such file or directory"
    assert vm.qmp.command("query-status")["running"]
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
    assert vm.descriptors() == before
    events = [
        event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
        for event in vm.qmp.events
    ]
    assert events == [
        "setup",
        "STOP",
        "active",
        "MIGRATION_PASS",
        "device",
        "completed",
        "failed",
        "RESUME",
    ]
    vm.update()
    wait_for_change(lambda: vm.u32(HEARTBEAT), "a good command afterwards works")


def test_lost_ram_is_refused_before_anything_stops(start, accel):
    vm = start(
        *accel_options(accel),
        *("-nodefaults", "-display", "none", "-m", "64M"),
        *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
    )
    with pytest.raises(QmpError) as refused:
        vm.qmp.command("cpr-exec")
    assert str(refused.value) == (
        "Memory region pc.ram is not compatible with CPR. share=on is required for "
        "memory-backend objects, and aux-ram-share=on is required."
    )
    assert vm.qmp.command("query-status")["running"]
    assert "STOP" not in [event["event"] for event in vm.qmp.events]


def test_no_child_is_left_and_sigterm_ends_it(start, accel):
    vm = start.guest("heartbeat", accel)
    vm.update()
    wait_for(lambda: not vm.children(), "the old image is reaped")
    vm.process.send_signal(signal.SIGTERM)
    assert vm.process.wait(10) == 0
