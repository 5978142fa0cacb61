"""What comes at a bad moment of an update, between the stop of the guest and the commit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from failing import HEARTBEAT, bad, start_vm, words
from harness.qmp import QmpError
from harness.vm import ALL_CPUS, VMM, Vm
from test_virtio_updates import MIB, Guest
from waiting import wait_for, wait_for_change

from cpr.faults import VARIABLE
from cpr.live.old_image import NO_TASK
from cpr.state.cpr_state import STATE_NAME

PIDS = Path("/sys/fs/cgroup/pids")


class Held:
    """A VM whose early update hangs at a step, with the guest stopped, until `let_go`."""

    def __init__(self, start: Any, accel: str, tmp_path: Path, *options: str) -> None:
        self.armed = tmp_path / "fault"
        self.vm: Vm = start(*words(accel), *options, env=os.environ | {VARIABLE: str(self.armed)})
        wait_for_change(lambda: self.vm.u32(HEARTBEAT), "the guest counts")

    def begin(self, step: str, **arguments: Any) -> None:
        self.armed.write_text(f"{step} hang")
        self.vm.qmp.command("cpr-exec", **arguments)

    def wait(self) -> int:
        """The PID of the guard, when the new image is at the step."""
        wait_for(lambda: not self.armed.exists(), "the new image is at the step")
        (guard,) = [pid for pid in self.vm.processes() if pid != self.vm.pid]
        return guard

    def let_go(self) -> None:
        Path(f"{self.armed}.go").touch()


def status(vm: Vm) -> str:
    return str(vm.ask("query-migrate").get("status"))


def counts(vm: Vm) -> None:
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")


@pytest.mark.parametrize("more", [[], ["stop"]], ids=["alone", "and a stop"])
def test_a_reset_is_not_done_in_ram_that_has_been_handed_over(start, accel, tmp_path, more):
    held = Held(start, accel, tmp_path)
    held.begin("commit")
    held.wait()
    mark = b"\xaa" * 8
    held.vm.ram[0x7C00:0x7C08] = mark  # where a boot sector is
    for name in ("system_reset", *more):
        held.vm.qmp.command(name)
    assert held.vm.qmp.command("query-status")["status"] == "finish-migrate"
    held.let_go()
    held.vm.reconnect()
    counts(held.vm)
    assert held.vm.ram[0x7C00:0x7C08] == mark


def test_a_reset_is_done_where_the_guest_comes_back(start, accel, tmp_path):
    held = Held(start, accel, tmp_path)
    held.begin("commit")
    held.wait()
    held.vm.ram[0x7C00:0x7C08] = bytes(8)
    held.vm.qmp.command("system_reset")
    held.vm.qmp.command("migrate_cancel")
    wait_for(lambda: any(held.vm.ram[0x7C00:0x7C08]), "it is booted again")
    counts(held.vm)


def test_after_migrate_continue_there_is_a_deadline(start, accel, tmp_path):
    held = Held(start, accel, tmp_path)
    capability = {"capability": "pause-before-switchover", "state": True}
    held.vm.qmp.command("migrate-set-capabilities", capabilities=[capability])
    held.vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=1500)
    held.begin("commit")
    wait_for(lambda: status(held.vm) == "pre-switchover", "it waits")
    held.vm.qmp.command("migrate-continue", state="pre-switchover")
    wait_for(lambda: status(held.vm) == "failed", "the deadline ends it")
    counts(held.vm)


def test_an_old_image_without_descriptors_ends(start, accel, tmp_path):
    held = Held(start, accel, tmp_path)
    held.begin("commit")
    guard = held.wait()
    used = {int(name) for name in os.listdir(f"/proc/{guard}/fd")}
    free = min(set(range(len(used) + 1)) - used)
    psutil.Process(guard).rlimit(psutil.RLIMIT_NOFILE, (free, 4096))
    held.let_go()
    wait_for(lambda: not psutil.pid_exists(guard), "the old image ends")
    held.vm.reconnect()
    counts(held.vm)


def test_a_command_that_waits_begins_no_second_update(start, accel, tmp_path):
    """A late update is refused while another client's cpr-exec waits to be read."""
    path, stream = str(tmp_path / "second"), f"file:{tmp_path}/stream"
    more = ("-chardev", f"socket,id=second,path={path},server=on,wait=off,cpr=on")
    vm: Vm = start(*words(accel), *more, "-mon", "chardev=second,mode=control")
    counts(vm)
    with socket.socket(socket.AF_UNIX) as second, second.makefile("r") as lines:
        second.connect(path)
        lines.readline()
        second.sendall(b'{"execute": "qmp_capabilities"}')
        lines.readline()
        started = tmp_path / "started"
        script = f'[ -n "$CPR_LIVE" ] && touch {started} && sleep 0.3; exec "$@"'
        refused = [*vm.words, "-smp", "1", "-incoming", stream]
        command = ["/bin/sh", "-c", script, "sh", *refused]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        vm.qmp.command("migrate", uri=stream)
        wait_for(started.exists, "the new program starts")
        second.sendall(json.dumps({"execute": "cpr-exec", "id": 1}).encode())
        answer = next(reply for line in lines if "id" in (reply := json.loads(line)))
    assert answer["error"]["desc"] == "There's a migration process in progress"
    vm.follow()
    wait_for(lambda: status(vm) == "failed", "the update has failed")
    counts(vm)


@pytest.mark.parametrize(
    ("what", "late", "kind"),
    [
        ("rollback", False, "exit"),
        ("rollback", True, "exit"),
        ("rollback", False, "die-before-commit"),
        ("kill", False, "hang-before-commit"),
    ],
)
def test_a_step_of_the_way_back_that_fails(start, accel, tmp_path, what, late, kind):
    command = [sys.executable, str(ROOT / "tests" / "patched_vmm.py"), what, "run"]
    vm: Vm = start(*words(accel), command=command)
    counts(vm)
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=500)
    stray = bad(kind)
    if late:
        stray += ["-incoming", f"file:{tmp_path}/stream"]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=stray)
        vm.qmp.command("migrate", uri=f"file:{tmp_path}/stream")
    else:
        vm.qmp.command("cpr-exec", command=stray)
    try:
        wait_for(lambda: status(vm) == "failed", "the update has failed")
        counts(vm)
        assert vm.ask("query-status")["status"] == "running"
    finally:
        if what == "kill":  # nobody could end it
            os.kill(vm.process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("what", "update", "guest"),
    [("power-off", "failed", "shutdown"), ("sleep", "completed", "suspended")],
)
def test_what_the_guest_asks_for_at_the_stop(start, accel, what, update, guest):
    command = [sys.executable, str(ROOT / "tests" / "patched_vmm.py"), what, "run"]
    vm: Vm = start(*words(accel), "-no-shutdown", command=command)
    vm.qmp.command("cpr-exec", command=[sys.executable, "-m", "cpr.vmm", "run", *vm.words[4:]])
    wait_for(lambda: status(vm) == update, "the update is over")
    wait_for(lambda: vm.ask("query-status")["status"] == guest, "that is done")


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize(("what", "exit_status"), [("power-off", 0), ("exit", 7)])
def test_a_guest_that_ends_the_vm_at_the_stop(start, accel, overlap, what, exit_status):
    """By ACPI or isa-debug-exit: neither the old nor the new VMM runs it past that."""
    command = [sys.executable, str(ROOT / "tests" / "patched_vmm.py"), what, "run"]
    vm: Vm = start(*words(accel), command=command)
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    vm.qmp.send("cpr-exec", command=[sys.executable, "-m", "cpr.vmm", "run", *vm.words[4:]])
    if what == "power-off":
        vm.qmp.wait_event("SHUTDOWN", 20)
        assert vm.qmp.events[-1]["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert vm.process.wait(20) == exit_status
    wait_for(lambda: not vm.processes(), "nothing is left")


@pytest.mark.parametrize(
    ("overlap", "what"), [("on", "memfd of the update"), ("off", f"write to memfd {STATE_NAME}")]
)
def test_no_memory_is_left_for_what_an_update_writes(start, accel, overlap, what):
    command = [sys.executable, str(ROOT / "tests" / "patched_vmm.py"), "memfd", "run"]
    vm: Vm = start(*words(accel), command=command)
    counts(vm)
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    with suppress(QmpError):
        vm.qmp.command("cpr-exec")
    wait_for(lambda: status(vm) == "failed", "the update has failed")
    assert vm.ask("query-migrate")["error-desc"] == f"{what}: Cannot allocate memory"
    counts(vm)
    assert vm.ask("query-status")["status"] == "running"


def test_no_task_is_left_for_the_guard(start, accel):
    group = PIDS / f"cpr-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / "pids.max"
        limit.write_text("max")
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"{PIDS}: {error.strerror}")
    vm = start_vm(start, accel)
    try:
        (group / "cgroup.procs").write_text(str(vm.pid))
        limit.write_text((group / "pids.current").read_text())
        vm.qmp.command("cpr-exec")
        wait_for(lambda: status(vm) == "failed", "the update has failed")
        assert vm.ask("query-migrate")["error-desc"] == NO_TASK
        for name in ("stop", "cont", "stop", "cont"):
            vm.qmp.command(name)
        counts(vm)
        limit.write_text("max")
        vm.update()
        counts(vm)
    finally:
        vm.close()
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "all of its tasks are gone")
        group.rmdir()


def test_an_execve_that_takes_too_long(start, tmp_path):
    source = tmp_path / "slow.c"
    source.write_text("""
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int execve(const char *path, char *const argv[], char *const envp[])
{
    for (char *const *each = envp; *each; each++) {
        if (strncmp(*each, "CPR_LIVE=", 9) == 0) {
            sleep(1000);
        }
    }
    return (int)syscall(SYS_execve, path, argv, envp);
}
""")
    library = tmp_path / "slow.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    vm: Vm = start(*words("tcg"), env=os.environ | {"LD_PRELOAD": str(library)})
    counts(vm)
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=300)
    vm.qmp.command("cpr-exec", command=bad("exit"))
    wait_for(lambda: status(vm) == "failed", "the deadline ends it")
    counts(vm)


def test_threads_of_a_disk_run_everywhere_after_an_update(accel, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(64 * MIB))
    guest = Guest(accel, disk, "-drive", f"file={disk},format=raw,if=virtio")
    with guest.vm as vm:
        guest.wait_rounds()
        for command in (bad("exit"), bad("refuse"), None):
            vm.update(**({"command": command} if command else {}))
            guest.wait_rounds()
            tasks = [thread.id for thread in psutil.Process(vm.follow()).threads()]
            cpus = [os.sched_getaffinity(task) for task in tasks]
            assert cpus == [ALL_CPUS] * len(tasks)


def test_every_number_of_descriptors_that_is_too_small(start):
    vm: Vm = start(*words("tcg"))
    counts(vm)
    for headroom in range(8):
        process = psutil.Process(vm.pid)
        most = max(vm.descriptors()) + 1
        process.rlimit(psutil.RLIMIT_NOFILE, (most + headroom, 4096))
        with suppress(QmpError):
            vm.qmp.command("cpr-exec")
            wait_for(lambda: status(vm) in ("failed", "completed"), "the update is over")
        process.rlimit(psutil.RLIMIT_NOFILE, (4096, 4096))
        assert vm.ask("query-status")["status"] == "running"
        counts(vm)
    vm.update()
    assert status(vm) == "completed"
    counts(vm)


def test_a_monitor_of_which_less_is_known_is_a_new_one(start, accel):
    """A client of an old VMM that says less than the new one needs starts anew, as at a restart."""
    command = [sys.executable, str(ROOT / "tests" / "patched_vmm.py"), "forgets", "run"]
    vm: Vm = start(*words(accel), command=command)
    counts(vm)
    first = vm.qmp
    vm.qmp.command("cpr-exec", command=[*VMM, *words(accel), *vm.words[-2:]])
    while "QMP" not in (message := first.read()):
        assert "event" in message or "return" in message
    assert first.execute("qmp_capabilities") == {"return": {}}
    assert vm.ask("query-status")["status"] == "running"
    assert "KeyError" in vm.complaints
    counts(vm)
