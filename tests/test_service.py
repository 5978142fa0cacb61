"""A VMM under a service manager, and as PID 1 of a container."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from failing import bad
from harness.vm import HEARTBEAT, ROOT, VMM, Vm
from waiting import wait_for, wait_for_change

SO_PASSCRED, SCM_CREDENTIALS = 16, 2  # of unix(7); `socket` has no name for the second
VERB = [sys.executable, "-m", "cpr.vmm", "cpr-exec"]
DIES = ["/bin/sh", "-c", '[ -n "$CPR_LIVE" ] && kill -9 $$; exec "$@"', "sh"]


class Manager:
    """A notify socket, in the abstract namespace; `said` is (PID of the sender, its fields)."""

    def __init__(self, name: str) -> None:
        self.address = f"@{name}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        self._socket.bind(f"\0{name}")
        self.said: list[tuple[int, list[str]]] = []

    def hear(self) -> list[tuple[int, list[str]]]:
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(4096, 256)
            except BlockingIOError:
                return self.said
            (pid,) = (
                struct.unpack_from("i", c)[0] for _, t, c in ancillary if t == SCM_CREDENTIALS
            )
            self.said.append((pid, data.decode().split("\n")))

    def heard(self) -> list[str]:
        """The first field of all that has come since the last call, "STATUS" without its text."""
        said, self.said = self.hear(), []
        return [
            fields[0].split("=")[0] if "STATUS" in fields[0] else fields[0] for _, fields in said
        ]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager() -> Iterator[Manager]:
    manager = Manager(f"cpr-test-{os.getpid()}")
    yield manager
    manager.close()


def verb(vm: Vm, *words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The verb, at a monitor that nobody else is connected to."""
    vm.qmp.close()
    command = [*prefix, *VERB, vm.socket, *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    vm.follow()
    vm.qmp = vm.connect()
    return done


def test_a_manager_always_knows_who_has_the_guest(start, manager: Manager) -> None:
    environment = os.environ | {"NOTIFY_SOCKET": manager.address}
    vm = start("examples/heartbeat.cfg", "-monitor", "none", env=environment)
    pid = vm.pid
    assert manager.hear() == [(pid, ["READY=1"])]
    manager.said.clear()

    rehearsed = verb(vm, "-t")
    assert (rehearsed.returncode, manager.heard()) == (0, [])
    assert rehearsed.stdout.startswith("cpr-exec would go ahead: ")

    done = verb(vm)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("early update: the guest stood still for ")
    wait_for(lambda: len(manager.hear()) == 6, "the update's end is told")
    (_, reloading), (sender, guard), *rest = manager.said
    assert reloading[0] == "RELOADING=1"
    assert reloading[1].startswith("MONOTONIC_USEC=")
    assert sender == pid, "it is told before the exec"
    assert guard[0] != f"MAINPID={pid}"
    assert (int(guard[0].partition("=")[2]), [f"MAINPID={pid}", "READY=1"]) in rest
    told = [fields[0] for sender, fields in rest if sender == pid]
    assert told[:2] == [f"MAINPID={pid}", "READY=1"]
    assert told[2].startswith("STATUS=early update: the guest stood still for ")
    manager.said.clear()

    refused = verb(vm, *VMM, *vm.words[len(VMM) :], "-smp", "2")
    assert refused.returncode == 1
    assert "CPUs: the guest has 1, this VMM would have 2" in refused.stderr
    assert vm.pid == pid
    manager.hear()
    assert "CPUs: the guest has 1" in manager.said[-1][1][0]
    assert f"MAINPID={pid}" in manager.heard()

    missing = verb(vm, "/nonexistent/vmm", "run")
    assert "No such file or directory" in missing.stderr
    wait_for(lambda: len(manager.hear()) >= 5, "the failure is told")
    heard = manager.heard()
    assert heard[2:] == [f"MAINPID={pid}", "READY=1", "STATUS"], heard

    died = verb(vm, *DIES, *vm.words)
    assert "was ended by signal 9" in died.stderr
    assert vm.pid != pid
    heard = manager.heard()
    assert heard[:4] == ["RELOADING=1", f"MAINPID={vm.pid}", f"MAINPID={vm.pid}", "READY=1"]
    os.kill(vm.pid, signal.SIGTERM)
    wait_for(lambda: not psutil.pid_exists(vm.pid), "it ends")
    assert manager.heard() == ["STOPPING=1"]


def test_the_verb_says_what_is_wrong(tmp_path: Path) -> None:
    for words, text in (
        (
            (f"{tmp_path}/qmp.sock",),
            "No such file or directory: the VMM has to run with -qmp unix:",
        ),
        ((), "cpr-exec: no SOCKET"),
    ):
        done = subprocess.run(
            [*VERB, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert text in done.stderr


def test_pid_1_of_a_container(start) -> None:
    """Updates leave it PID 1; it reaps whose parents have ended, and not what is waited for;
    SIGTERM ends the container.
    """
    if os.geteuid() != 0:
        pytest.skip("a PID namespace needs root")
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", *VMM]
    vm = start("examples/heartbeat.cfg", "-monitor", "none", command=unshare)
    (init,) = psutil.Process(vm.process.pid).children()
    vm.pid = init.pid
    inside = ("nsenter", "-t", str(init.pid), "--pid", "--mount", f"--wd={ROOT}")

    def update(*words: str) -> str:
        vm.qmp.close()
        command = [*inside, *VERB, vm.socket, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        vm.qmp = vm.connect()
        return done.stdout + done.stderr

    def check() -> None:
        wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
        subprocess.run([*inside, "sh", "-c", "sleep 0.1 & exec true"], check=True, timeout=60)
        wait_for(lambda: not init.children(), "what has ended is reaped")
        assert init.is_running()

    check()
    assert "cannot be rehearsed" in update("-t", "sh", "-c", "echo 7; exit 1", "run"), "no answer"
    assert "has ended with exit status 1" in update("-t", *bad("exit"))
    check()
    assert update().startswith("early update: ")
    check()
    assert "CPUs: the guest has 1" in update(*VMM, *vm.words[len(unshare) :], "-smp", "2")
    check()
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap="off")
    assert update().startswith("late update: ")
    check()
    init.send_signal(signal.SIGTERM)
    assert vm.process.wait(20) == 0
