"""Updates and migrations that meet what is missing, slow or asked for at a bad moment."""

from __future__ import annotations

import mmap
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from failing import HEARTBEAT, Failing, bad, start_vm, words
from harness.qmp import QmpError
from harness.vm import VMM, Vm
from waiting import wait_for, wait_for_change


def counts(vm: Vm) -> None:
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")


def copied(folder: Path) -> dict[str, str]:
    """A copy of the program, and the environment in which `-m cpr.vmm` is that."""
    shutil.copytree(ROOT / "cpr", folder / "cpr", ignore=shutil.ignore_patterns("__pycache__"))
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_module_that_is_broken_is_missing_or_refuses(start, accel, tmp_path, late):
    """One that a VMM needs only later: an early update is refused by it, a late one works."""
    environment = copied(tmp_path / "new")
    (tmp_path / "new" / "cpr" / "monitor" / "introspect.py").write_text("def (\n")
    images = [word.replace("examples/", f"{ROOT}/examples/") for word in words(accel)]
    vm: Vm = start(*images)
    failing = Failing(vm)
    program = tmp_path / "program"
    program.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={environment['PYTHONPATH']}\ncd {tmp_path}/new\n"
        f'exec {sys.executable} -m cpr.vmm "$@"\n'
    )
    program.chmod(0o755)
    if late:
        vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap="off")
    vm.qmp.command(
        "cpr-exec", command=[str(program), "run", *vm.words[vm.words.index("run") + 1 :]]
    )
    if late:
        vm.reconnect()
        counts(vm)
        assert vm.ask("query-migrate")["status"] == "completed"
    else:
        failing.check("invalid syntax", same_pid=True)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_relative_pidfile_in_a_folder_that_is_gone(start, accel, tmp_path, overlap):
    folder = tmp_path / "folder"
    folder.mkdir()
    images = [word.replace("examples/", f"{ROOT}/examples/") for word in words(accel)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    vm: Vm = start(*images, "-pidfile", "vm.pid", cwd=folder, env=environment)
    wait_for(lambda: vm.u32(HEARTBEAT), "the guest counts")
    (folder / "vm.pid").unlink()
    folder.rmdir()
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    vm.update()
    counts(vm)
    assert "cannot create PID file: Could not create 'vm.pid'" in vm.stderr


def test_a_migration_whose_reader_does_not_end_is_cancelled(start, accel, tmp_path):
    vm = start_vm(start, accel)
    vm.ask("migrate", uri="exec:cat >/dev/null; exec sleep 1000")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "device", "all is written")
    vm.ask("migrate_cancel")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "cancelled", "it is cancelled")
    assert vm.ask("query-status")["running"]
    counts(vm)


def test_a_stream_that_is_read_resumes_no_guest_in_the_same_ram(start, accel, tmp_path):
    """Who has read it may run the guest: only the user can know, and says `cont`."""
    ram = f"memory-backend-file,id=ram0,size=64M,share=on,mem-path={tmp_path}/ram"
    options = [ram if "memfd" in word else word for word in words(accel)]
    vm: Vm = start(*options)
    ignores = {"capability": "x-ignore-shared", "state": True}
    vm.qmp.command("migrate-set-capabilities", capabilities=[ignores])
    vm.ask("migrate", uri=f"exec:cat >/dev/null; touch {tmp_path}/read; exec sleep 1000")
    wait_for((tmp_path / "read").exists, "all is read")
    assert vm.ask("query-migrate")["status"] == "device"
    vm.ask("migrate_cancel")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "cancelled", "it is cancelled")
    assert vm.ask("query-status")["status"] == "postmigrate"
    assert "the guest stays stopped: whoever has read the stream may run it" in vm.stderr
    vm.qmp.command("cont")
    assert vm.ask("query-status")["running"]


def test_quit_right_after_a_late_update_leaves_nothing(start, accel, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    vm: Vm = start(*words(accel), env=os.environ | {"TMPDIR": str(folder)})
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap="off")
    vm.qmp.send("cpr-exec")
    vm.qmp.send("quit")
    assert vm.process.wait(20) == 0
    assert not list(folder.iterdir())


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_temporary_folder_that_is_gone(start, accel, overlap, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    vm: Vm = start(*words(accel), env=os.environ | {"TMPDIR": str(folder)})
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    folder.rmdir()
    vm.update()
    assert vm.ask("query-migrate")["status"] == "completed"
    assert not list(Path("/tmp").glob(f"cpr-exec-{vm.pid}-*"))
    assert vm.complaints == ""


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("room", [0, 64 << 10, 12 << 20], ids=["none", "64K", "12M"])
def test_no_memory_for_an_update(start, accel, room, late, tmp_path):
    """A thread without memory for its first frame would end, and its vCPU stand still."""
    vm: Vm = start(*words(accel))
    failing = Failing(vm)
    unlimited = resource.prlimit(vm.pid, resource.RLIMIT_AS)
    most = psutil.Process(vm.pid).memory_info().vms + room
    resource.prlimit(vm.pid, resource.RLIMIT_AS, (most, unlimited[1]))
    with suppress(QmpError):  # some of it is found out at once
        failing.update(["/bin/false"], late, tmp_path / "state")
    wait_for(lambda: vm.ask("query-migrate").get("status") == "failed", "the update has failed")
    assert vm.ask("query-status")["running"]
    failing.check_counter()
    assert "Traceback" not in vm.stderr
    resource.prlimit(vm.follow(), resource.RLIMIT_AS, unlimited)
    failing.update_well()


def deferred(vm: Vm, folder: Path, *more: str) -> None:
    """A late update whose new image waits for migrate-incoming."""
    command = [*vm.words, "-incoming", "defer", *more]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    vm.qmp.command("migrate", uri=f"file:{folder}/state")
    vm.reconnect()
    assert vm.ask("query-status")["status"] == "inmigrate"


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
def test_a_vm_that_waits_for_migrate_incoming_ends(start, accel, tmp_path, how):
    pidfile = tmp_path / "pid"
    vm: Vm = start(*words(accel), "-pidfile", str(pidfile))
    deferred(vm, tmp_path)
    if how == "quit":
        vm.qmp.send("quit")
    else:
        vm.process.terminate()
    assert vm.process.wait(20) == 0
    wait_for(lambda: not vm.processes(), "the guard ends, too")
    assert not pidfile.exists()


def test_a_wrong_name_for_migrate_incoming_can_be_put_right(start, accel, tmp_path):
    """In a late update, whose guest stands still; QEMU would take no other one."""
    vm: Vm = start(*words(accel), "-pidfile", str(tmp_path / "pid"))
    deferred(vm, tmp_path)
    for uri in (f"file:{tmp_path}/missing", f"unix:{tmp_path}/no/socket", "tcp:127.0.0.1:http"):
        with pytest.raises(QmpError, match=r"Could not open|Failed to bind"):
            vm.qmp.command("migrate-incoming", uri=uri)
        assert vm.qmp.command("query-migrate") == {}
    vm.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/state")
    counts(vm)


def test_the_pidfile_of_a_vm_whose_load_fails(start, accel, tmp_path):
    pidfile = tmp_path / "pid"
    vm: Vm = start(*words(accel), "-pidfile", str(pidfile))
    failing = Failing(vm)
    deferred(vm, tmp_path)
    (tmp_path / "nonsense").write_bytes(b"nonsense" * 1000)
    vm.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/nonsense")
    failing.check("Not a migration stream", same_pid=True)
    assert int(pidfile.read_text()) == vm.pid == failing.first_pid


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_session_that_ends_with_the_new_image(start, accel, tmp_path, late):
    """The VMM leads it, as in a terminal of its own: the new image's end hangs that up."""
    master, terminal = pty.openpty()
    prefix = ["setsid", "-c", *VMM]
    try:
        vm: Vm = start(*words(accel), command=prefix, stdin=terminal)
        vm.pid = vm.process.pid
        wait_for(lambda: os.getsid(vm.pid) == vm.pid, "it leads a session")
        failing = Failing(vm)
        failing.update(bad("die"), late, tmp_path / "state")
        failing.check("ended by signal 9", same_pid=False)
    finally:
        os.close(terminal)
        os.close(master)


def test_a_second_update_waits_for_an_old_image_that_knows_no_token(start, accel, tmp_path):
    """The first is to a program that is not asked: its guard sees only that it lives on."""
    vm = start_vm(start, accel)
    wrapper = tmp_path / "wrapper"
    vmm = " ".join(VMM).removesuffix("run")
    wrapper.write_text(f'#!/bin/sh\nword=ru\nexec {vmm} ${{word}}n "$@"\n')
    wrapper.chmod(0o755)
    options = vm.words[vm.words.index("run") + 1 :]
    vm.qmp.command("cpr-exec", command=[str(wrapper), *options])
    vm.reconnect()
    with pytest.raises(QmpError, match="the VMM before this one has not ended yet"):
        vm.qmp.command("cpr-exec", command=["/bin/false"])
    counts(vm)

    def is_taken() -> bool:
        with suppress(QmpError):
            vm.qmp.command("cpr-exec")
            return True
        return False

    wait_for(is_taken, "the old image has ended")
    vm.reconnect()
    counts(vm)


def test_a_guard_whose_caller_was_first(start, accel, tmp_path):
    """The exec fails at the deadline, and the caller takes its time to end the guard."""
    slow = tmp_path / "slow.c"
    slow.write_text(SLOW_EXEC)
    library = tmp_path / "slow.so"
    build = ["gcc", "-shared", "-fPIC", "-o", str(library), str(slow), "-ldl"]
    subprocess.run(build, check=True)
    armed = tmp_path / "armed"
    environment = os.environ | {"LD_PRELOAD": str(library), "SLOW_EXEC": str(armed)}
    vm: Vm = start(*words(accel), env=environment)
    wait_for(lambda: vm.u32(HEARTBEAT), "the guest counts")
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=900)
    armed.touch()
    vm.qmp.command("cpr-exec")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "failed", "the update fails")
    armed.unlink()
    time.sleep(0.5)
    assert vm.processes() == [vm.pid]
    counts(vm)
    vm.update()
    counts(vm)


# execve fails in the moment of the deadline, and the caller is delayed where it has taken the token
# and ends the guard, by kill(2).
SLOW_EXEC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

static int failed;

int execve(const char *path, char *const argv[], char *const envp[])
{
    int (*real)(const char *, char *const *, char *const *) = dlsym(RTLD_NEXT, "execve");
    const char *armed = getenv("SLOW_EXEC");

    if (armed && access(armed, F_OK) == 0) {
        usleep(800000);
        failed = 1;
        errno = ENOEXEC;
        return -1;
    }
    return real(path, argv, envp);
}

int kill(pid_t pid, int number)
{
    int (*real)(pid_t, int) = dlsym(RTLD_NEXT, "kill");

    if (failed && number == SIGKILL) {
        failed = 0;
        usleep(400000);
    }
    return real(pid, number);
}
"""


def test_an_update_without_proc(start, accel):
    """Nothing is tried: a guard finds its descriptors there."""
    hidden = ["unshare", "-m", "sh", "-c", 'umount -l /proc; exec "$@"', "sh", *VMM]
    vm: Vm = start(*words(accel), command=hidden)
    reason = "there is no /proc, in which an update finds its descriptors"
    with pytest.raises(QmpError, match=reason):
        vm.qmp.command("cpr-exec")
    assert vm.qmp.command("cpr-exec", test=True)["refusals"] == [reason]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=vm.words)
    with pytest.raises(QmpError, match=reason):
        vm.qmp.command("migrate", uri=f"file:{vm.directory}/stream")
    assert vm.qmp.command("query-status")["running"]
    assert vm.complaints == ""


def test_a_vmm_whose_starter_ignores_its_children(start, accel):
    """It would never know how a command has ended."""
    ignores = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    command = [sys.executable, "-c", f"{ignores} os.execv(sys.argv[1], sys.argv[1:])", *VMM]
    vm: Vm = start(*words(accel), command=command)
    vm.qmp.command("migrate", uri="exec:cat >/dev/null; exit 3")
    wait_for(lambda: vm.qmp.command("query-migrate").get("status") == "failed", "it has failed")
    counts(vm)


STRAY = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGUSR2)


def test_signals_that_go_astray_and_one_that_does_not(start, accel, tmp_path):
    """A timer of the program before, say; Ctrl-\\ ends the VM with all that belongs to it."""
    pidfile = tmp_path / "pid"
    vm: Vm = start(*words(accel), "-pidfile", str(pidfile))
    for number in STRAY:
        os.kill(vm.pid, number)
        counts(vm)
    vm.update()
    os.kill(vm.follow(), signal.SIGALRM)
    counts(vm)
    os.kill(vm.pid, signal.SIGQUIT)
    wait_for(lambda: not pidfile.exists() and not Path(vm.socket).exists(), "it has ended")
    assert "terminating on signal 3" in vm.stderr


def test_words_in_the_background_of_a_terminal_stop_nobody():
    """`stty tostop`: SIGTTOU would stop the VMM, and its guest."""
    script = """
import os, sys, termios
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)  # of this session from now on
settings = termios.tcgetattr(terminal)
settings[3] |= termios.TOSTOP
termios.tcsetattr(terminal, termios.TCSANOW, settings)
if os.fork() == 0:
    os.setpgid(0, 0)
    os.dup2(terminal, 2)
    from cpr import report, terminal as writing
    report.error_report("a report")
    writing.write(terminal, b"and more")
    os._exit(7)
_, status = os.waitpid(-1, os.WUNTRACED)
os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1)
"""
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-c", script, os.ttyname(theirs)]
        assert subprocess.run(command, cwd=ROOT, timeout=30, check=False).returncode == 7
        assert os.read(ours, 1000).startswith(b"cpr-vmm: a report")
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_program_that_does_not_get_the_environment(start, accel):
    """It would start another guest, at this one's monitors: nothing is tried."""
    vm: Vm = start(*words(accel))
    command = ["env", "-i", *vm.words]
    reason = "does not hand its environment to the new program"
    with pytest.raises(QmpError, match=reason):
        vm.qmp.command("cpr-exec", command=command)
    assert reason in vm.qmp.command("cpr-exec", command=command, test=True)["refusals"][0]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    for overlap in ("on", "off"):
        vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
        with pytest.raises(QmpError, match=reason):
            vm.qmp.command("migrate", uri=f"file:{vm.directory}/stream")
    assert Path(vm.socket).exists() and vm.processes() == [vm.pid]
    counts(vm)
    vm.update(command=["env", *vm.words])
    counts(vm)


def test_a_second_vmm_does_not_boot_into_the_ram_of_a_guest(start, accel, tmp_path):
    """In a file: it is locked from the start, also over updates, and free when its VMM ends."""
    backend = f"memory-backend-file,id=ram0,size=16M,share=on,mem-path={tmp_path}/ram"
    drive = "file=examples/build/heartbeat.img,format=raw,if=floppy"
    arguments = f"-machine pc,memory-backend=ram0 -m 16M -object {backend} -drive {drive}".split()
    second = [*VMM, "-accel", accel, *arguments, "-monitor", "none"]
    vm: Vm = start("-accel", accel, *arguments)
    for _ in range(3):
        done = subprocess.run(second, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert done.stderr == (
            'cpr-vmm: Failed to get "write" lock: another VMM has a guest in the file of ram0\n'
        )
        vm.update()
        vm.follow()
    deferred(vm, tmp_path)
    assert subprocess.run(second, capture_output=True, timeout=30, check=False).returncode == 1
    vm.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/state")
    before = (tmp_path / "ram").read_bytes()[HEARTBEAT : HEARTBEAT + 4]
    wait_for(lambda: (tmp_path / "ram").read_bytes()[HEARTBEAT : HEARTBEAT + 4] != before, "counts")
    vm.qmp.send("quit")
    vm.process.wait(10)
    start("-accel", accel, *arguments)


def test_ram_in_a_folder_goes_over_updates_that_change_the_pid(start, accel, tmp_path):
    """Its file has no name: another process would make another one, and the guest were lost."""
    folder = tmp_path / "ram"
    folder.mkdir()
    backend = f"memory-backend-file,id=ram0,size=16M,share=on,mem-path={folder}"
    drive = "file=examples/build/heartbeat.img,format=raw,if=floppy"
    arguments = f"-machine pc,memory-backend=ram0 -m 16M -object {backend} -drive {drive}".split()
    vm: Vm = start("-accel", accel, *arguments)
    assert not list(folder.iterdir())
    path = next(
        f"/proc/{vm.pid}/fd/{fd}"
        for fd, name in vm.descriptors().items()
        if name.startswith(str(folder))
    )
    with open(path, "rb") as file:
        ram = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    vm.qmp.command("cpr-exec", command=["/bin/sh", "-c", "exit 3", str(vm.directory)])
    wait_for(lambda: "goes on in the old VMM" in vm.stderr, "it has failed")
    vm.follow()
    vm.qmp.close()
    vm.qmp = vm.connect()
    for _ in range(2):
        vm.update()
        vm.follow()
        wait_for_change(lambda: ram[HEARTBEAT], "the guest counts in that RAM")


@pytest.mark.parametrize("overlap", ["off", "on"], ids=["late", "early"])
def test_sigquit_in_an_update_ends_the_vm(start, accel, overlap):
    vm: Vm = start(*words(accel))
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    vm.qmp.send("cpr-exec")
    wait_for(lambda: len(vm.processes()) == 2, "the new image and the guard")
    os.kill(vm.pid, signal.SIGQUIT)
    wait_for(lambda: not vm.processes(), "all have ended")
    assert vm.complaints == "cpr-vmm: terminating on signal 3\n"
