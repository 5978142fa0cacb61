"""Late updates whose new program fails: the guest goes on, and so does whoever talks to it."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
import time
from functools import partial

import psutil
import pytest
from conftest import ROOT
from harness.vm import HEARTBEAT, VMM, Vm
from waiting import TIMEOUT, wait_for, wait_for_change

BASE = [
    *("-nodefaults", "-display", "none", "-m", "64M"),
    *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
    *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
]
DIES = ["/bin/sh", "-c", '[ -n "$CPR_LIVE" ] && kill -9 $$; exec "$@"', "sh"]


def has_failed(vm: Vm, count: int) -> bool:
    return vm.stderr.count("goes on in the old VMM") == count


def runs(vm: Vm) -> None:
    """It is one process now, whose monitor and guest are there."""
    vm.follow()
    vm.qmp.close()
    vm.qmp = vm.connect()
    assert vm.qmp.command("query-status")["running"]
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")


def has_come_back(vm: Vm, count: int) -> None:
    """The update number `count` has failed, and nothing of the new program is left."""
    wait_for(partial(has_failed, vm, count), "it fails")
    wait_for(lambda: len(vm.processes()) == 1, "one process is left")
    runs(vm)


@pytest.mark.parametrize("program", [DIES, ["/bin/sh", "-c", "exit 3", "sh"]], ids=["dies", "ends"])
def test_a_new_program_that_ends_leaves_guest_and_monitor(start, accel, program):
    """A client is connected, whose socket the exec closes, and the guard takes the next one."""
    vm = start.guest("heartbeat", accel)
    for count in (1, 2):
        stream = f"file:{vm.directory}/stream"
        words = [*program, *VMM, *vm.words[len(VMM) :], "-incoming", stream]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=words)
        vm.qmp.send("migrate", uri=stream)
        has_come_back(vm, count)
        assert vm.qmp.command("query-migrate")["status"] == "failed"
    assert "Traceback" not in vm.stderr


def test_a_chardev_that_cannot_be_made_again_leaves_the_others(start, accel, tmp_path):
    """It is the first, and the monitor's comes after it."""
    command = [sys.executable, str(ROOT / "tests" / "patched_vmm.py"), "connect", "run"]
    with socket.socket(socket.AF_UNIX) as peer:
        peer.bind(str(tmp_path / "peer"))
        peer.listen()
        options = ["-chardev", f"socket,id=client,path={tmp_path}/peer"]
        vm = start.guest("heartbeat", accel, *options, command=command)
        stream = f"file:{vm.directory}/stream"
        words = [*DIES, *VMM, *vm.words[len(command) :], "-incoming", stream]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=words)
        vm.qmp.send("migrate", uri=stream)
        has_come_back(vm, 1)
    assert "Too many open files" in vm.stderr


def script(vm: Vm, text: str) -> list[str]:
    """A program that is not asked what it knows: `text`, in which $VMM is this VM's command."""
    vmm = f'{shlex.join([*VMM, *vm.words[len(VMM) :]])} "$@"'
    return ["/bin/sh", "-c", text.replace("$VMM", vmm), str(vm.directory)]


def test_a_script_that_waits_for_the_vmm_hands_it_the_guest(start, accel):
    """It has all its descriptors for ever, and its end is the guest's."""
    vm = start.guest("heartbeat", accel)
    old = vm.pid
    vm.qmp.command("cpr-exec", command=script(vm, "$VMM; exit $?"))
    wait_for(lambda: len(vm.processes()) == 3, "script, VMM and guard")
    wait_for(lambda: len(vm.processes()) == 2, "the guard has ended")
    vm.qmp.close()
    vm.qmp = vm.connect()
    assert vm.qmp.command("query-status")["running"]
    assert vm.qmp.command("query-migrate")["status"] == "completed"
    assert not list(vm.directory.glob("cpr-exec-*"))
    vm.pid = max(vm.processes(), key=lambda pid: pid != old)
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    vm.qmp.send("quit")
    assert vm.process.wait(10) == 0
    wait_for(lambda: not vm.processes(), "nothing is left")
    assert vm.complaints == ""


@pytest.mark.parametrize(
    "text",
    ["sh -c 'sleep 1000; true' $0 & exit 3", "(kill -9 $$; sleep 1; $VMM) & wait"],
    ids=["ends", "dies"],
)
def test_a_script_that_fails_leaves_nothing_that_it_has_started(start, accel, text):
    vm = start.guest("heartbeat", accel)
    vm.qmp.command("cpr-exec", command=script(vm, text))
    has_come_back(vm, 1)


def test_a_program_that_a_signal_has_ended_ends_the_vm(start, accel):
    """It was meant for the VM, and is told so: no guest goes on."""
    vm = start.guest("heartbeat", accel)
    vm.qmp.command("cpr-exec", command=["/bin/sh", "-c", "kill -TERM $$", str(vm.directory)])
    wait_for(lambda: "terminating on signal 15" in vm.stderr, "it is told")
    wait_for(lambda: not vm.processes(), "all have ended")
    assert vm.complaints == "cpr-vmm: terminating on signal 15\n"


def test_a_second_failure_and_a_script_that_hides_one(start):
    """What the first had in its environment is no sign of the second; nor is 0 of a script."""
    vm = start.guest("heartbeat", "tcg")
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap="off")
    vm.update()
    missing = "$VMM -incoming file:/nonexistent; echo ended"
    for count, text in enumerate(("exit 3", "sleep 0.3; exit 3", missing, "exit 4"), 1):
        vm.qmp.command("cpr-exec", command=script(vm, text))
        has_come_back(vm, count)


def test_a_script_that_ends_before_its_vmm(start):
    """It has failed, and the guest is in the VMM that it has started: nobody else runs it too."""
    vm = start.guest("heartbeat", "tcg")
    vm.qmp.command("cpr-exec", command=script(vm, "$VMM & sleep 1.5; exit 1"))
    vm.process.wait(20)
    time.sleep(2)
    assert len(vm.processes()) == 1
    runs(vm)
    assert vm.qmp.command("query-migrate")["status"] == "completed"
    assert "goes on in the old VMM" not in vm.stderr


def test_a_guest_that_ends_with_a_status_of_its_own_right_after(start, accel, tmp_path):
    """In a program that is not asked what it knows: the old image does not run it again."""
    code = bytes.fromhex(
        "fa31c08ed8"  # cli; ds = 0
        "66ff060080"  # again: inc dword [0x8000]
        "803e009000"  # cmp byte [0x9000], 0
        "74f4"  # jz again
        "b007ba0105ee"  # out 0x501, 7
        "66ff060480ebf9"  # more: inc dword [0x8004]; jmp more
    )
    image = tmp_path / "guest.img"
    image.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1474560 - 512))
    drive = f"file={image},format=raw,if=floppy"
    vm = start(*BASE, "-drive", drive, "-accel", accel, "-device", "isa-debug-exit")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    old = vm.pid
    program = ["setsid", *VMM, *vm.words[len(VMM) :], "-incoming", f"file:{tmp_path}/stream"]
    hidden = ["/bin/sh", "-c", 'exec "$@" 1>&-', "sh", *program]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=hidden)
    vm.qmp.send("migrate", uri=f"file:{tmp_path}/stream")
    vm.reconnect()
    assert vm.pid == old
    vm.ram[0x9000] = 1
    assert vm.process.wait(TIMEOUT) == 15
    wait_for(lambda: not vm.processes(), "no old image goes on")
    assert "goes on" not in vm.stderr


def execute(vm: Vm, source: str, deadline_ms: int, words: list[str] | None = None) -> None:
    """Begins a late update to this VMM's own program, which loads from `source`.

    `words` are those of its command line, where they are others."""
    parameters = {
        "mode": "cpr-exec",
        "cpr-exec-command": [*VMM, *(words or vm.words[len(VMM) :]), "-incoming", source],
        "x-cpr-exec-timeout": deadline_ms,
    }
    vm.qmp.command("migrate-set-parameters", parameters)
    vm.qmp.send("migrate", uri=f"file:{vm.directory}/stream")


@pytest.mark.parametrize("exits", [False, True])
def test_a_deferred_load_that_fails_gives_the_guest_back(start, accel, tmp_path, exits):
    """Whatever exit-on-error says: the guest stands still for it."""
    vm = start.guest("heartbeat", accel)
    old = vm.pid
    execute(vm, "defer", deadline_ms=0)
    wait_for(lambda: not is_open(vm), "the exec")
    vm.qmp = vm.connect()
    (tmp_path / "bad").write_bytes(b"x" * 5000)
    vm.qmp.send("migrate-incoming", uri=f"file:{tmp_path}/bad", exit_on_error=exits)
    wait_for(partial(has_failed, vm, 1), "it fails")
    runs(vm)
    assert vm.pid == old, "the old command has it again"
    assert "Not a migration stream" in vm.qmp.command("query-migrate")["error-desc"]


def test_a_deferred_load_that_nobody_could_ask_for(start, accel, tmp_path):
    """Its only monitor cannot be made: the guest would stand still for ever."""
    vm = start.guest("heartbeat", accel)
    words = " ".join(vm.words[len(VMM) :]).replace(f"unix:{vm.socket}", "unix:/nonexistent/qmp")
    execute(vm, "defer", deadline_ms=0, words=words.split())
    wait_for(partial(has_failed, vm, 1), "it fails")
    runs(vm)
    assert "there is no monitor" in vm.ask("query-migrate")["error-desc"]


def is_open(vm: Vm) -> bool:
    try:
        vm.qmp.command("query-status")
    except ConnectionError:
        return False
    return True


def test_the_source_of_a_new_image_ends_with_it(start, tmp_path):
    vm = start.guest("heartbeat", "tcg")
    source = f"exec:echo $$ >{tmp_path}/pid; exec sleep 1000"
    execute(vm, source, deadline_ms=1500)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it starts")
    pid = int((tmp_path / "pid").read_text())
    wait_for(partial(has_failed, vm, 1), "the deadline")
    wait_for(lambda: not psutil.pid_exists(pid), "the command has ended too")
    runs(vm)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_refusal_where_the_folder_is_gone(start, accel, tmp_path, overlap):
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    drive = f"file={ROOT}/examples/build/heartbeat.img,format=raw,if=floppy"
    vm = start(*BASE, "-drive", drive, "-accel", accel, cwd=folder, env=environment)
    shutil.rmtree(folder)
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    vm.qmp.send("cpr-exec", command=[*VMM, *vm.words[len(VMM) :], "-bogus"])
    wait_for(partial(has_failed, vm, 1), "it is refused")
    runs(vm)
    assert "-bogus: invalid option" in vm.qmp.command("query-migrate")["error-desc"]
    assert "Traceback" not in vm.stderr


def test_a_new_program_that_has_few_descriptors(start):
    vm = start.guest("heartbeat", "tcg")
    limited = ["/bin/sh", "-c", 'ulimit -n 8; exec "$@"', "sh"]
    vm.qmp.send("cpr-exec", command=[*limited, *VMM, *vm.words[len(VMM) :]])
    wait_for(partial(has_failed, vm, 1), "it fails")
    runs(vm)
    assert "raise RLIMIT_NOFILE" in vm.qmp.command("query-migrate")["error-desc"]
    assert "Traceback" not in vm.stderr
