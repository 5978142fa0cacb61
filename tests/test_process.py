"""The process around a VMM: -pidfile, -daemonize, signals, names, and a second start."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
import pytest
from harness.qmp import Qmp
from harness.vm import VMM
from waiting import is_listening, wait_for

from cpr.vmm.daemon import Pidfile

ARGUMENTS = (
    *("-nodefaults", "-display", "none", "-m", "16M"),
    *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
    *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
    *("-drive", "file=examples/build/timer.img,format=raw,if=floppy"),
)


def test_pidfile_is_there_over_updates_and_gone_at_the_end(start, accel, tmp_path):
    path = tmp_path / "vmm.pid"
    vm = start("-accel", accel, *ARGUMENTS, "-pidfile", str(path))
    assert path.read_text() == f"{vm.pid}\n"
    vm.update()
    wait_for(lambda: path.read_text() == f"{vm.pid}\n", "the new image writes it again")
    vm.qmp.send("quit")
    vm.process.wait(10)
    assert not path.exists()


def test_a_pidfile_that_is_not_at_its_path_here_is_written_where_it_is(tmp_path):
    """As in a root of its own, which the process has got after it was made."""
    path, outside = tmp_path / "pid", tmp_path / "outside"
    pidfile = Pidfile(str(path))
    path.rename(outside)
    outside.write_text("")
    pidfile.rewrite()
    assert int(outside.read_text()) == os.getpid()
    assert not path.exists()
    outside.unlink()
    pidfile.rewrite()
    assert int(path.read_text()) == os.getpid(), "one that has gone is made again"
    pidfile.remove()


def test_a_pidfile_in_use_is_refused(start, accel, tmp_path):
    path = tmp_path / "vmm.pid"
    start("-accel", accel, *ARGUMENTS, "-pidfile", str(path))
    second = subprocess.run(
        [*VMM, "-accel", accel, *ARGUMENTS, "-pidfile", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert f"Cannot lock '{path}': Resource temporarily unavailable" in second.stderr


def connect(path):
    deadline = time.monotonic() + 20
    while True:
        try:
            return Qmp(path)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_daemonize_returns_when_it_is_up_and_updates_keep_the_pid(guests, accel, tmp_path):
    pidfile, path = tmp_path / "pid", str(tmp_path / "qmp.sock")
    monitor = ("-qmp", f"unix:{path},server=on,wait=off")
    command = [*VMM, "-accel", accel, *ARGUMENTS, "-daemonize", "-pidfile", str(pidfile), *monitor]
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
    pid = int(pidfile.read_text())
    try:
        qmp = connect(path)
        assert qmp.command("query-status")["running"]
        assert os.getsid(pid) != os.getsid(0)
        qmp.command("cpr-exec")
        wait_for(
            lambda: qmp.command("query-migrate").get("status") == "completed", "the update is done"
        )
        assert qmp.command("query-status")["running"]
        assert int(pidfile.read_text()) == pid
        qmp.send("quit")
        qmp.wait_closed()
        wait_for(lambda: not psutil.pid_exists(pid), "the daemon ends")
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_daemonize_tells_of_a_failed_start(guests, accel):
    command = [*VMM, "-accel", accel, *ARGUMENTS[:-1], "file=/nonexistent", "-daemonize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Could not open '/nonexistent'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_in_order(start, accel, number):
    vm = start("-accel", accel, *ARGUMENTS)
    vm.process.send_signal(number)
    vm.qmp.wait_closed()
    shutdown = [event["data"] for event in vm.qmp.events if event["event"] == "SHUTDOWN"]
    assert shutdown == [{"guest": False, "reason": "host-signal"}]
    assert vm.process.wait(10) == 0


WAITING = {
    "client": ["-chardev", "socket,id=c,path={},server=on", "-serial", "chardev:c"],
    "source": [
        *("-incoming", "defer"),
        *("-incoming", "cpr,addr.transport=socket,addr.type=unix,addr.path={}"),
    ],
}


@pytest.mark.parametrize("whom", WAITING)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_start_that_waits(guests, accel, tmp_path, whom, number):
    path = str(tmp_path / "socket")
    words = [word.format(path) for word in WAITING[whom]]
    command = [*VMM, "-accel", accel, *ARGUMENTS, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: is_listening(path), "it waits")
        process.send_signal(number)
        error = process.communicate(timeout=10)[1]
    assert process.returncode == 1
    assert error.splitlines()[-1] == f"cpr-vmm: terminating on signal {number.value}"
    assert "Traceback" not in error


@pytest.mark.parametrize("delay", [0, 0.01, 0.03, 0.08, 0.2])
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_signal_in_an_update_ends_the_vm_in_order(start, accel, tmp_path, overlap, delay):
    """The PID is the VM's, whichever program is starting under it."""
    pidfile = tmp_path / "pid"
    setting = ("-global", f"migration.x-cpr-exec-overlap={overlap}")
    vm = start("-accel", accel, *ARGUMENTS, *setting, "-pidfile", str(pidfile))
    vm.qmp.send("cpr-exec")
    time.sleep(delay)
    vm.process.send_signal(signal.SIGTERM)
    assert vm.process.wait(20) == 0
    wait_for(lambda: vm.processes() == [], "all of it ends")
    assert not pidfile.exists()
    assert "terminating on signal 15" in vm.stderr


def test_a_signal_to_a_new_program_that_hangs_ends_the_vm(start):
    """The old VMM looks at what was sent, and gives the program seconds to end by itself."""
    accel = "tcg"
    vm = start("-accel", accel, *ARGUMENTS)
    hang = ["/bin/sh", "-c", '[ -n "$CPR_LIVE" ] && exec sleep 60; exec "$@"', "sh"]
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=1000)
    vm.qmp.command("cpr-exec", command=[*hang, *VMM, "-accel", accel, *ARGUMENTS])
    wait_for(lambda: psutil.Process(vm.pid).name() == "sleep", "the new program hangs")
    vm.process.send_signal(signal.SIGTERM)
    vm.process.wait(20)
    wait_for(lambda: vm.processes() == [], "all of it ends")
    assert "terminating on signal 15" in vm.stderr


def test_a_pinned_vcpu_stays_pinned_where_the_exec_fails(start, accel):
    vm = start("-accel", accel, *ARGUMENTS)

    def thread() -> int:
        return int(vm.qmp.command("query-cpus-fast")[0]["thread-id"])

    before = thread()
    os.sched_setaffinity(before, {0})
    vm.qmp.command("cpr-exec", command=["/nonexistent/vmm", "x"])
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "failed", "the exec fails")
    assert thread() != before
    assert os.sched_getaffinity(thread()) == {0}


def test_process_name_is_kept_over_an_update(start, accel):
    vm = start("-accel", accel, *ARGUMENTS, "-name", "guest=g,process=my-guest")

    def name() -> str:
        return psutil.Process(vm.pid).name()

    assert name() == "my-guest"
    vm.update()
    wait_for(lambda: name() == "my-guest", "the new image has the name again")


@pytest.mark.parametrize("option", ["-help", "-version"])
def test_help_and_version_go_to_stdout(option):
    done = subprocess.run([*VMM, option], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpr-vmm" in done.stdout


def test_a_pidfile_overwrites_nothing_of_others(start, accel, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("precious\n")
    link.symlink_to(target)
    vm = start("-accel", accel, *ARGUMENTS, "-pidfile", str(link))
    assert int(link.read_text()) == vm.pid and not link.is_symlink()
    words = [*VMM, "-accel", accel, *ARGUMENTS, "-pidfile", str(target)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and "has in it what is no PID" in done.stderr
    assert target.read_text() == "precious\n"


@pytest.mark.parametrize("option", ["-pidfile", "-qmp"])
def test_no_device_is_replaced_or_removed(tmp_path, option):
    """As root it would be gone for everybody on this host."""
    device = tmp_path / "null"
    os.mkfifo(device)
    value = str(device) if option == "-pidfile" else f"unix:{device},server=on,wait=off"
    words = [*VMM, *ARGUMENTS, option, value]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and str(device) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert device.is_fifo()
