"""Updates that go well, or are told to stop: what the guest and the monitors see of them."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
from conftest import ROOT
from failing import DEADLINE_MS, Failing, bad, own, start_vm, words
from harness.qmp import QmpError
from harness.vm import HEARTBEAT
from waiting import wait_for, wait_for_change


def on(*names: str) -> list[dict]:
    return [{"capability": name, "state": True} for name in names]


def trail(vm) -> list[str]:
    return [
        event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
        for event in vm.qmp.events
    ]


@pytest.mark.parametrize("overlap", ["on", "off", "auto"])
def test_the_guest_goes_on_through_many(start, accel, overlap):
    vm = start_vm(start, accel, "-global", f"migration.x-cpr-exec-overlap={overlap}")
    failing = Failing(vm)
    for _ in range(3):
        vm.update()
        failing.check_counter()
        told = vm.qmp.command("query-migrate")
        assert told["x-cpr-update"] == ("late" if overlap == "off" else "early")
        assert vm.qmp.command("query-status") == {"status": "running", "running": True}
    assert vm.complaints == ""
    wait_for(lambda: failing.look() == failing.figures, "descriptors, threads, children are flat")
    assert vm.pid == failing.first_pid


def test_events_of_an_early_update(start, accel):
    vm = start_vm(start, accel)
    vm.qmp.command("migrate-set-capabilities", capabilities=on("events"))
    vm.update()
    assert trail(vm) == ["setup", "active", "STOP", "device", "completed", "RESUME"]


@pytest.mark.parametrize("capability", ["x-ignore-shared", "mapped-ram", "validate-uuid"])
def test_capabilities_are_about_streams_only(start, accel, capability):
    vm = start_vm(start, accel)
    vm.qmp.command("migrate-set-capabilities", capabilities=on(capability))
    vm.update()
    assert vm.qmp.command("query-status")["running"]
    assert vm.complaints == ""


def test_a_second_one_is_refused_and_leaves_the_first_alone(start, accel, tmp_path):
    vm = start_vm(start, accel)
    failing = Failing(vm)
    failing.update(bad("hang-after-hello"), False, tmp_path / "state")
    for name, arguments in (("cpr-exec", {}), ("migrate", {"uri": "file:/dev/null"})):
        with pytest.raises(QmpError, match="There's a migration process in progress"):
            vm.qmp.command(name, **arguments)
    assert vm.qmp.command("query-migrate")["status"] in ("setup", "active")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "failed", "the deadline of the first")
    failing.update_well()


def test_cancel_leaves_the_guest_in_the_old_image(start, accel):
    vm = start_vm(start, accel)
    failing = Failing(vm)
    vm.qmp.command("cpr-exec", command=bad("hang-after-hello"))
    vm.qmp.command("migrate_cancel")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "cancelled", "it is cancelled")
    assert vm.ask("query-migrate")["error-desc"].startswith("Switchover is interrupted")
    failing.check_counter()
    wait_for(lambda: len(vm.processes()) == 1, "the new program has ended")
    assert failing.look() == failing.figures
    vm.update()
    failing.check_counter()


@pytest.mark.parametrize("goes_on", [True, False], ids=["continue", "cancel"])
def test_pause_before_switchover(start, accel, goes_on):
    vm = start_vm(start, accel)
    failing = Failing(vm)
    vm.qmp.command("migrate-set-capabilities", capabilities=on("pause-before-switchover"))
    vm.qmp.command("cpr-exec")
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "pre-switchover", "it waits")
    assert vm.qmp.command("query-status")["running"], "the guest runs meanwhile"
    failing.check_counter()
    if goes_on:
        vm.qmp.command("migrate-continue", state="pre-switchover")
        vm.reconnect()
        assert vm.qmp.command("query-migrate")["status"] == "completed"
    else:
        vm.qmp.command("migrate_cancel")
        assert vm.ask("query-migrate")["status"] == "cancelled"
    assert vm.ask("query-status")["running"]
    failing.check_counter()


def test_after_an_upgrade_in_place_the_guard_stays(start, accel, tmp_path):
    """The old command would execute another program than the one that the guest is in."""
    copy = tmp_path / "program"
    shutil.copytree(ROOT / "cpr", copy / "cpr", ignore=shutil.ignore_patterns("__pycache__"))
    images = [word.replace("examples/", f"{ROOT}/examples/") for word in words(accel)]
    vm = start(*images, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)})
    failing = Failing(vm)
    (copy / "cpr" / "errors.py").touch()
    vm.qmp.command("cpr-exec", command=[sys.executable, "-m", "cpr.vmm", "run", *images, "-bogus"])
    failing.check("-bogus: invalid option", same_pid=False)


@pytest.mark.parametrize("late", [False, True], ids=["cpr-exec", "migrate"])
def test_the_pidfile_follows(start, accel, tmp_path, late):
    pidfile = tmp_path / "pid"
    vm = start_vm(start, accel, "-pidfile", str(pidfile))
    failing = Failing(vm)
    assert int(pidfile.read_text()) == vm.pid
    failing.update(bad("die"), late, tmp_path / "state")
    failing.check("ended by signal 9", same_pid=False)
    assert int(pidfile.read_text()) == vm.pid != failing.first_pid
    vm.update()
    assert int(pidfile.read_text()) == vm.pid


def test_the_way_back_does_not_wait_for_migrate_continue(start, accel):
    """It was let go to the new program, which has refused."""
    vm = start_vm(start, accel)
    capability = {"capability": "pause-before-switchover", "state": True}
    vm.qmp.command("migrate-set-capabilities", capabilities=[capability])
    vm.qmp.command("cpr-exec", command=own(*words(accel, cpus=1)))
    vm.reconnect()
    answer = vm.qmp.command("query-migrate")
    assert answer["status"] == "failed"
    assert "CPUs: the guest has 2" in answer["error-desc"]


# Rehearsals.


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (None, None),
        (lambda accel: own(*words(accel)), None),
        (lambda accel: own(*words(accel), "-bogus"), "-bogus: invalid option"),
        (lambda accel: own(*words(accel, "32M")), "Size mismatch: ram0"),
        (lambda accel: own(*words(accel, cpus=1)), "CPUs: the guest has 2, this VMM would have 1"),
        (lambda accel: bad("exit"), "has ended with exit status 1"),
        (lambda accel: bad("import"), "no_such_module"),
        (lambda accel: bad("hang"), "is not ready after"),
        (lambda accel: bad("refuse"), "it does not feel like it"),
        (lambda accel: ["/nonexistent/vmm", "run"], "No such file or directory"),
    ],
)
def test_a_rehearsal_tells_and_does_nothing(start, accel, command, text):
    vm = start_vm(start, accel)
    failing = Failing(vm)
    arguments = {} if command is None else {"command": command(accel)}
    if text == "is not ready after":
        vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=DEADLINE_MS)
    answer = vm.qmp.command("cpr-exec", test=True, **arguments)
    if text is None:
        assert answer["refusals"] == []
        assert answer["start-time"] > 0
    else:
        assert "start-time" not in answer
        assert text in answer["refusals"][0]
    assert vm.qmp.command("query-migrate") == {}
    assert failing.look() == failing.figures
    failing.check_counter()
    assert not [event for event in vm.qmp.events if event["event"] in ("STOP", "MIGRATION")]
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest goes on")


def test_a_program_that_knows_no_protocol_cannot_be_rehearsed(start, accel):
    vm = start_vm(start, accel)
    assert vm.qmp.command("cpr-exec", test=True, command=["true"]) == {"refusals": []}
    assert "cannot be rehearsed" in vm.qmp.hmp("cpr-exec -t true")


def test_another_version_of_the_hand_over_is_refused_before_anything_stops(start, accel, tmp_path):
    later = [sys.executable, "-c", "print(7, 8)", "run"]
    text = "the new program speaks version 7, 8 of the hand-over, this one 1"
    vm = start_vm(start, accel)
    assert text in vm.qmp.command("cpr-exec", test=True, command=later)["refusals"][0]
    with pytest.raises(QmpError, match=text):
        vm.qmp.command("cpr-exec", command=later)
    assert vm.qmp.command("query-migrate") == {}
    assert not vm.qmp.events
    vm.update(command=vm.words)  # one that does speak it


def test_nobody_goes_on_from_where_the_update_does_not_wait(start, accel):
    """migrate-continue with the state in which it is, which is no pause before the switchover."""
    vm = start.guest("heartbeat", accel)
    vm.qmp.send_raw(
        b'{"execute": "cpr-exec"}\n'
        b'{"execute": "migrate-continue", "arguments": {"state": "setup"}}\n'
    )
    vm.reconnect()
    assert vm.ask("query-migrate")["status"] == "completed"
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
    assert "Traceback" not in vm.stderr
