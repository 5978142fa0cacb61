"""`migrate` in mode cpr-exec as a tool drives it: URIs, defer, events, the new process."""

from __future__ import annotations

import json
import os
import sys

import psutil
import pytest
from harness.qmp import QmpError
from harness.vm import HEARTBEAT, VMM
from waiting import wait_for, wait_for_change

UPDATE_MEMBERS = ("x-cpr-downtime-ns", "x-cpr-update", "x-cpr-phases")
DUMPER = """
import json, os, sys, time
fds = {}
for name in os.listdir("/proc/self/fd"):
    try: fds[name] = os.readlink("/proc/self/fd/" + name)
    except OSError: pass
state = os.environ.get("QEMU_CPR_EXEC_STATE")
data = os.pread(int(state), 1 << 20, 0).hex()
report = [os.getpid(), os.getppid(), os.getcwd(), sys.argv, state, fds, data]
json.dump(report, open(sys.argv[1], "w"))
os.close(int(state))  # from here on it has the guest
time.sleep(1)
"""


def prepare(vm, command):
    """Sets mode and command, and turns the events of the migration on."""
    vm.qmp.command("migrate-set-capabilities", capabilities=[on("events")])
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)


def on(capability):
    return {"capability": capability, "state": True}


def own_command(vm, *more):
    """The VMM's own words, as a management tool would repeat them."""
    return [*psutil.Process(vm.pid).cmdline(), *more]


def trail(vm):
    """The events so far, migration states by their name."""
    return [
        event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
        for event in vm.qmp.events
    ]


def test_events_and_answers_on_both_sides(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    assert vm.qmp.command("query-migrate") == {}
    prepare(vm, own_command(vm, "-incoming", f"file:{tmp_path}/state"))
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    assert trail(vm) == ["setup", "STOP"], "what comes before the answer"
    vm.reconnect()
    assert vm.qmp.command("query-status") == {"status": "running", "running": True}
    assert vm.qmp.command("query-migrate").keys() == {"status", *UPDATE_MEMBERS}
    parameters = vm.qmp.command("query-migrate-parameters")
    assert (parameters["mode"], parameters["cpr-exec-command"]) == ("normal", [])
    assert not any(entry["state"] for entry in vm.qmp.command("query-migrate-capabilities"))


def test_source_events_to_the_end(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    prepare(vm, own_command(vm, "-incoming", f"file:{tmp_path}/state"))
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    vm.qmp.wait_closed()
    assert trail(vm) == ["setup", "STOP", "active", "MIGRATION_PASS", "device", "completed"]
    vm.qmp = vm.connect()


def test_defer_and_migrate_incoming(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    prepare(vm, own_command(vm, "-incoming", "defer"))
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    vm.reconnect()
    assert vm.qmp.command("query-status") == {"status": "inmigrate", "running": False}
    assert vm.qmp.command("query-migrate") == {}
    stands = vm.u32(HEARTBEAT)
    vm.qmp.command("migrate-set-capabilities", capabilities=[on("events")])
    vm.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/state")
    wait_for(lambda: vm.qmp.command("query-status")["running"], "the guest resumes")
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "completed", "it completes")
    assert trail(vm) == ["setup", "active", "RESUME", "completed"]
    wait_for(lambda: vm.u32(HEARTBEAT) != stands, "the guest counts on")


def test_a_failed_incoming_leaves_the_process_where_asked(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel, "-incoming", "defer")
    with pytest.raises(QmpError, match="Could not open '/nonexistent/x'"):
        vm.qmp.command("migrate-incoming", uri="file:/nonexistent/x")
    assert vm.qmp.command("query-status")["status"] == "inmigrate"
    with pytest.raises(QmpError, match="Illegal migration incoming state: setup"):
        vm.qmp.command("migrate-incoming", uri="file:/nonexistent/x")


def test_a_bad_stream_is_told_apart(start, accel, tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(b"XXXX" + bytes(20))
    vm = start.guest("heartbeat", accel, "-incoming", "defer")
    vm.qmp.command("migrate-incoming", uri=f"file:{bad}", exit_on_error=False)
    wait_for(lambda: vm.qmp.command("query-migrate").get("status") == "failed", "the load fails")
    assert vm.qmp.command("query-migrate")["error-desc"] == (
        "load of migration failed: Invalid argument: Not a migration stream, "
        "magic: 58585858 != 5145564d"
    )
    assert vm.qmp.command("query-status")["status"] == "inmigrate"


@pytest.mark.parametrize("uri", ["file:{path},offset=4096", "exec:cat > {path}"])
def test_other_channels(start, accel, tmp_path, uri):
    path = tmp_path / "state"
    out = uri.format(path=path)
    back = out if uri.startswith("file") else f"exec:cat {path}"
    vm = start.guest("heartbeat", accel)
    before = vm.u32(HEARTBEAT)
    prepare(vm, own_command(vm, "-incoming", back))
    vm.qmp.command("migrate", uri=out)
    vm.reconnect()
    wait_for(lambda: vm.qmp.command("query-status")["running"], "the guest resumes")
    wait_for(lambda: vm.u32(HEARTBEAT) != before, "the guest counts on")
    if "offset" in uri:
        assert path.read_bytes()[4096:4100] == b"QEVM"


def test_what_the_new_process_is_given(start, accel, tmp_path):
    dumper = tmp_path / "dumper.py"
    dumper.write_text(DUMPER)
    report = tmp_path / "report"
    folder = os.path.dirname(sys.executable)
    vm = start.guest("heartbeat", accel, env=os.environ | {"PATH": folder})
    preserved = {str(fd): name for fd, name in vm.descriptors().items() if "memfd" in name}
    parent = os.getpid()
    prepare(vm, ["python", str(dumper), str(report), "last word"])
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    vm.qmp.wait_closed()
    assert vm.process.wait(20) == 0
    pid, ppid, cwd, argv, state, fds, data = json.loads(report.read_text())
    assert (pid, ppid, cwd) == (vm.pid, parent, os.getcwd())
    assert argv == [str(dumper), str(report), "last word"]
    assert data.startswith("51435052" + "00000001")
    memfds = {fd: name for fd, name in fds.items() if "memfd" in name}
    assert memfds == preserved | {state: "/memfd:QEMU_CPR_EXEC_STATE (deleted)"}
    others = {fd for fd in fds if fd not in memfds and not fds[fd].startswith("/proc")}
    assert others == {"0", "1", "2"}


def test_path_is_searched(start, accel, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "new-vmm"
    program.write_text("#!/bin/sh\ntouch $0.ran\nexit 7\n")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    vm = start.guest("heartbeat", accel, env=environment)
    prepare(vm, ["new-vmm"])
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    assert vm.process.wait(20) == 7
    assert (folder / "new-vmm.ran").exists()
    wait_for(lambda: vm.ask("query-status")["running"], "the old image goes on")


def test_pause_before_switchover_goes_on_or_is_cancelled(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    prepare(vm, own_command(vm, "-incoming", f"file:{tmp_path}/state"))
    vm.qmp.command("migrate-set-capabilities", capabilities=[on("pause-before-switchover")])
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "pre-switchover", "it waits")
    assert vm.qmp.command("query-status")["status"] == "finish-migrate"
    with pytest.raises(QmpError, match="There's a migration process in progress"):
        vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    with pytest.raises(QmpError, match="Migration is not finalized yet"):
        vm.qmp.command("cont")
    vm.qmp.command("migrate_cancel")
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "cancelled", "it is cancelled")
    assert vm.qmp.command("query-migrate")["error-desc"] == "Switchover is interrupted"
    assert vm.qmp.command("query-status")["running"]
    assert trail(vm)[-3:] == ["cancelling", "RESUME", "cancelled"]
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "pre-switchover", "it waits")
    vm.qmp.command("migrate-continue", state="pre-switchover")
    vm.reconnect()
    assert vm.qmp.command("query-status")["running"]


def test_refusals_leave_the_guest_alone(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec")
    with pytest.raises(QmpError, match="cpr-exec mode requires setting cpr-exec-command"):
        vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    vm.qmp.command("migrate-set-parameters", cpr_exec_command=["/bin/true"])
    for arguments, text in (
        ({}, "need either 'uri' or 'channels' argument"),
        ({"uri": "bogus:x"}, "unknown migration protocol: bogus:x"),
        ({"uri": "file:x,offset=zzz"}, "file URI has bad offset zzz: Invalid argument"),
        ({"uri": "fd:nope"}, "File descriptor named 'nope' has not been found"),
    ):
        with pytest.raises(QmpError) as refused:
            vm.qmp.command("migrate", **arguments)
        assert str(refused.value) == text
    assert vm.qmp.command("query-status")["running"]
    assert "STOP" not in trail(vm)


def test_an_updated_vmm_tells_of_its_next_migration(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    vm.update()
    told = vm.qmp.command("query-migrate")
    assert told.keys() == {"status", *UPDATE_MEMBERS}
    assert (told["status"], told["x-cpr-update"]) == ("completed", "early")
    assert 0 < told["x-cpr-downtime-ns"] < 20e9
    assert {"exec", "stop", "load"} <= {phase["name"] for phase in told["x-cpr-phases"]}
    vm.qmp.command("migrate-set-parameters", mode="cpr-reboot")
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "completed", "it completes")
    assert vm.qmp.command("query-migrate")["ram"]["transferred"] > 0


def test_dry_run_tells_all_and_does_nothing(start, accel):
    vm = start.guest("heartbeat", accel)
    answer = vm.qmp.command("cpr-exec", test=True)
    assert answer["refusals"] == []
    assert answer["start-time"] > 0
    assert "would go ahead: the new program was ready in " in vm.qmp.hmp("cpr-exec -t")
    assert "No such file or directory" in vm.qmp.hmp("cpr-exec -t /nonexistent/vmm")
    assert vm.qmp.command("query-migrate") == {}
    assert vm.qmp.command("query-status")["running"]


def test_state_file_is_read_by_the_standard_layout(start, accel, tmp_path):
    """The stream is QEMU's: magic, configuration, sections, and a description at its end."""
    vm = start.guest("heartbeat", accel)
    prepare(vm, ["/bin/true"])
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    vm.process.wait(20)
    data = (tmp_path / "state").read_bytes()
    assert data[:8] == b"QEVM\0\0\0\3"
    description = json.loads(data[data.index(b'{"configuration"') :])
    names = [device["name"] for device in description["devices"]]
    assert names[:2] == ["timer", "cpu"]
    assert names[-1] == "globalstate"


@pytest.mark.parametrize(
    ("image", "address"), [("smp.elf", 0x8004), ("churn.elf", HEARTBEAT), ("heartbeat.bin", 0x8000)]
)
def test_kernel_images_boot_and_survive(start, accel, image, address):
    vm = start(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "64M", "-smp", "2"),
        *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-kernel", f"examples/build/{image}"),
    )
    wait_for_change(lambda: vm.u32(address), "the guest counts")
    vm.update()
    wait_for_change(lambda: vm.u32(address), "the guest counts on")


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("memory-backend-ram,share=on", "ram0"),
        ("memory-backend-shm", None),
        ("memory-backend-file,share=on,mem-path={path}", None),
        ("memory-backend-memfd,share=on,prealloc=on", "memory-backend-memfd"),
    ],
)
def test_every_shared_backend_survives(start, accel, tmp_path, backend, name):
    ram = f"{backend.format(path=tmp_path / 'ram')},id=ram0,size=64M"
    vm = start(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "64M"),
        *("-object", ram, "-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
    )

    def counter() -> int:
        return int(vm.qmp.hmp("xp /1dw 0x8000").split(":")[1])

    wait_for_change(counter, "the guest counts")
    before = counter()
    vm.update()
    assert (counter() - before) & 0xFFFFFFFF < 1 << 31
    wait_for_change(counter, "the guest counts on")
    if name is not None:
        assert vm.ram_path(name)


def test_more_than_four_gigabytes_reach_over_the_pci_hole(start, accel):
    vm = start(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "4G"),
        *("-object", "memory-backend-memfd,id=ram0,size=4G,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
    )
    vm.ram[3 << 30 : (3 << 30) + 4] = b"\x78\x56\x34\x12"
    vm.update()
    assert "0x12345678" in vm.qmp.hmp("xp /1xw 0x100000000")
    tree = vm.qmp.hmp("info mtree")
    assert "0000000100000000-000000013fffffff" in tree


def test_default_command_repeats_the_vmm(start, accel):
    vm = start.guest("heartbeat", accel, "-name", "guest=demo")
    first = own_command(vm)
    assert first[: len(VMM)] == VMM
    for _ in range(2):
        vm.update()
        words = own_command(vm)
        assert words[-2] == "-incoming"
        assert words[words.index("run") : -2] == first[len(VMM) - 1 :]
        assert vm.qmp.command("query-name") == {"name": "demo"}
        assert not list(vm.directory.glob("cpr-exec-*")), "the temporary directory is removed"


@pytest.mark.parametrize("offset", [0, 4096])
def test_a_file_that_takes_not_all_gives_its_room_back(start, accel, tmp_path, offset):
    """The guest may need it: for RAM in a file on the same disk, or an image."""
    path = tmp_path / "state"
    path.write_bytes(b"\xaa" * offset)
    vm = start.guest("churn", accel)
    psutil.Process(vm.pid).rlimit(psutil.RLIMIT_FSIZE, (16384, 16384))
    vm.qmp.command("migrate", uri=f"file:{path},offset={offset}")
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "failed", "it fails")
    assert path.read_bytes() == b"\xaa" * offset
    assert vm.qmp.command("query-status")["running"]
