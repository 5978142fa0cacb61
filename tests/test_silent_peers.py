"""Peers that do not answer: each wait for one can be ended, and none holds the monitors."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hung_mount
import psutil
import pytest
from descriptors import open_fds
from harness.qmp import Qmp, QmpError
from harness.vm import Vm
from test_device_updates import Source
from test_survives_guest import Console
from waiting import TIMEOUT, wait_for

from cpr.errors import MigrationError
from cpr.live.transaction import PROTOCOL
from cpr.mainloop import MainLoop
from cpr.migration import channel, incoming, outgoing
from cpr.migration.asking import ENDING
from cpr.migration.cancellation import INTERRUPTED, Cancellation
from cpr.migration.capabilities import IN_PROGRESS
from cpr.migration.connect import connect
from cpr.migration.cpr_transfer import Transfer
from cpr.migration.program import ANSWER_TIMEOUT
from cpr.state.cpr_state import CprState


@pytest.fixture
def full(tmp_path: Path) -> Iterator[str]:
    """The path of a unix socket whose queue of connections is full."""
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(path)
        yield path
        for each in waiting:
            each.close()


def addr(path: str) -> dict[str, str]:
    return {"transport": "socket", "type": "unix", "path": path}


def test_a_target_that_accepts_nobody(start, full):
    """migrate_cancel ends the wait; the next update goes well.  A cpr channel is refused."""
    vm: Vm = start.guest("heartbeat", "tcg")
    vm.ask("migrate", uri=f"unix:{full}")
    assert vm.ask("query-migrate")["status"] == "setup"
    vm.ask("migrate_cancel")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "cancelled", "it is cancelled")
    vm.ask("migrate-set-parameters", mode="cpr-transfer")
    channels = [
        {"channel-type": kind, "addr": addr(path)} for kind, path in (("main", "/m"), ("cpr", full))
    ]
    with pytest.raises(QmpError, match=f"Failed to connect to '{full}': Resource temporarily"):
        vm.ask("migrate", channels=channels)
    vm.update()
    assert vm.ask("query-migrate")["status"] == "completed"


def test_a_connection_is_made_when_there_is_room(full):
    made: list[int] = []
    cancellation = Cancellation()
    thread = threading.Thread(target=lambda: made.append(connect(addr(full), cancellation)))
    thread.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{full}.roomy")
        listener.listen()
        os.rename(f"{full}.roomy", full)
        thread.join()
    os.close(made[0])
    cancellation.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_where_nobody_listens(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    cancellation = Cancellation()
    with pytest.raises(MigrationError, match="Connection refused"):
        connect(
            {"transport": "socket", "type": "inet", "host": host, "port": str(port)}, cancellation
        )
    cancellation.close()


@pytest.mark.parametrize("kind", ["fifo", "exec", "fd"])
def test_a_source_that_says_nothing(start, tmp_path, kind):
    """Monitors answer, and SIGTERM ends the VMM."""
    vm: Vm = start.guest("heartbeat", "tcg", "-incoming", "defer")
    uri = {"fifo": f"file:{tmp_path}/fifo", "exec": "exec:sleep 1000", "fd": "fd:pipe"}[kind]
    os.mkfifo(tmp_path / "fifo")
    reader, writer = os.pipe()
    vm.qmp.send("getfd", fds=(reader,), fdname="pipe")
    assert vm.qmp.read() == {"return": {}}
    vm.ask("migrate-incoming", uri=uri)
    wait_for(lambda: vm.ask("query-migrate").get("status") == "active", "it reads")
    vm.process.send_signal(signal.SIGTERM)
    assert vm.process.wait(10) == 0
    os.close(reader)
    os.close(writer)


def test_a_source_that_writes_late_to_a_fifo(start, tmp_path):
    """It is no end of the stream that nobody has opened the FIFO yet."""
    state, fifo = tmp_path / "state", tmp_path / "fifo"
    source: Vm = start.guest("heartbeat", "tcg")
    source.ask("migrate", uri=f"file:{state}")
    wait_for(lambda: source.ask("query-migrate")["status"] == "completed", "it is saved")
    os.mkfifo(fifo)
    target: Vm = start.guest("heartbeat", "tcg", "-incoming", "defer")
    target.ask("migrate-incoming", uri=f"file:{fifo}")
    wait_for(lambda: target.ask("query-migrate").get("status") == "active", "it reads")
    fifo.write_bytes(state.read_bytes())
    wait_for(lambda: target.ask("query-status")["running"], "the guest has come")


class ManyFds:
    """So many preserved descriptors that no socket takes their messages at once."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()

    def state(self) -> CprState:
        return CprState([(f"fd{number}", 0, self.read) for number in range(600)], [])


def test_a_target_that_reads_its_state_late(tmp_path):
    path = str(tmp_path / "cpr")
    loop, fds = MainLoop(), ManyFds()
    gone: list[bool] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        before = len(open_fds())
        transfer = Transfer(fds, loop, addr(path), False)
        assert transfer.begin(lambda: gone.append(True))
        loop.iterate(0)
        with listener.accept()[0] as target:
            received, ended = 0, False
            while not ended:
                data, came, _, _ = socket.recv_fds(target, 65536, 16)
                received += len(came)
                for fd in came:
                    os.close(fd)
                ended = not data
                loop.iterate(0)
        assert received == 600 and not gone
        loop.iterate(None)
    assert gone == [True]
    assert len(open_fds()) == before - 1  # the listener
    loop.close()
    os.close(fds.read)
    os.close(fds.write)


def no_thread(*arguments: Any) -> int:
    raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_start_fails_the_migration(monkeypatch, guests, tmp_path):
    for module in (outgoing, incoming):
        monkeypatch.setattr(module, "start_new_thread", no_thread)
    source = Source(str(guests / "heartbeat.img"))
    source.migration.migrate(f"file:{tmp_path}/state")
    source.run_to_the_end()
    assert (source.migration.status, source.migration.error) == ("failed", incoming.NO_THREAD)
    source.close()
    target = Source(str(guests / "heartbeat.img"))
    target.migration.incoming_side.expect(False)
    target.migration.incoming("exec:sleep 1000", None, False)
    target.loop.iterate(None)
    assert (target.migration.status, target.migration.error) == ("failed", incoming.NO_THREAD)
    target.close()


def test_a_command_that_lives_on_refuses_no_update(start, guests):
    """It has closed its end of the pipe, or has said all; it is reaped, and not waited for."""
    vm: Vm = start.guest("heartbeat", "tcg")
    vm.ask("migrate", uri=f"exec:cat >{vm.directory}/stream; sleep 1000")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "active", "the stream is written")
    vm.ask("migrate_cancel")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "cancelled", "it is cancelled")
    vm.ask("migrate", uri="exec:exec 0<&-; sleep 1000")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "failed", "nobody reads")
    vm.update()
    assert vm.ask("query-migrate")["status"] == "completed"


def test_a_source_that_lives_on_refuses_no_update(start, guests, tmp_path):
    first: Vm = start.guest("heartbeat", "tcg")
    first.ask("migrate", uri=f"file:{tmp_path}/stream")
    wait_for(lambda: first.ask("query-migrate")["status"] == "completed", "it is written")
    first.close()
    command = f"exec:cat {tmp_path}/stream; exec >&-; sleep 1000"
    vm: Vm = start.guest("heartbeat", "tcg", "-incoming", command)
    wait_for(lambda: vm.ask("query-status")["running"], "the guest runs")
    vm.update()
    assert vm.ask("query-migrate")["status"] == "completed"
    for child in psutil.Process(vm.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the old image, which ends
            child.kill()


def hanging(tmp_path: Path, answers: bool) -> list[str]:
    """A program that hangs when it is asked what it knows, or when it is rehearsed."""
    program = tmp_path / "program"
    answer = f'[ "$1" = protocol ] && echo {PROTOCOL} && exit' if answers else ""
    program.write_text(f"#!/bin/sh\n{answer}\ntouch {tmp_path}/hangs\nexec sleep 1000\n")
    program.chmod(0o755)
    return [str(program), "run"]


@pytest.mark.parametrize("answers", [False, True])
def test_a_program_that_is_only_asked_and_hangs(start, tmp_path, answers):
    """SIGTERM ends the VMM."""
    vm: Vm = start.guest("heartbeat", "tcg")
    vm.qmp.send("cpr-exec", command=hanging(tmp_path, answers), test=True)
    wait_for((tmp_path / "hangs").exists, "it hangs")
    began = time.monotonic()
    vm.process.send_signal(signal.SIGTERM)
    assert vm.process.wait(60) == 0
    assert time.monotonic() - began < ANSWER_TIMEOUT / 2
    assert not vm.processes()


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """No process can be killed, as another user's cannot; those that are left to be reaped."""
    left: list[Any] = []

    def refuse(pid: int, signo: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["cpr.vmm", "run"])
        patch.setattr(os, "killpg", refuse)
        patch.setattr(channel, "reap_later", lambda *child: left.append(child))
        yield left
    for pid, reap in left:
        os.kill(pid, signal.SIGKILL)
        reap()


@pytest.mark.parametrize("answers", [False, True])
def test_a_program_that_cannot_be_killed_is_not_waited_for(untouchable, guests, tmp_path, answers):
    source = Source(str(guests / "heartbeat.img"))
    source.machine.interrupted = (tmp_path / "hangs").exists
    before = open_fds()
    found = source.migration.check_cpr_exec(hanging(tmp_path, answers))
    assert found.refusals == [ENDING]
    assert len(untouchable) == 1 and open_fds() == before
    source.close()


class Waiting:
    """A VM of which one monitor waits for a program that hangs."""

    def __init__(self, start: Any, tmp_path: Path) -> None:
        self.path = str(tmp_path / "second")
        self.monitor_path = str(tmp_path / "monitor")
        words = ["-qmp", f"unix:{self.path},server=on,wait=off"]
        words += ["-monitor", f"unix:{self.monitor_path},server=on,wait=off"]
        self.console = Console(start, "tcg", *words)
        self.vm: Vm = self.console.vm
        self.lines = 0

    def check(self, program: list[str]) -> None:
        """The guest's devices are served, and other monitors, but no other update is begun."""
        self.lines += 1
        self.console.type("word\n")
        assert self.console.line() == f"{self.lines}: word"
        second = Qmp(self.path)
        assert second.command("query-status")["running"]
        for words in (None, program):
            with pytest.raises(QmpError, match=IN_PROGRESS):
                second.command("cpr-exec", **({"command": words} if words else {}))
            refused = second.command("cpr-exec", test=True, **({"command": words} if words else {}))
            assert refused == {"refusals": [IN_PROGRESS]}
        second.command("migrate_cancel")
        second.close()

    def end(self) -> None:
        assert self.vm.qmp.command("query-migrate") == {}
        assert not psutil.Process(self.vm.pid).children()
        self.vm.update()


@pytest.mark.parametrize("answers", [False, True])
def test_others_are_served_while_a_program_hangs(start, tmp_path, answers):
    waiting = Waiting(start, tmp_path)
    program = hanging(tmp_path, answers)
    qmp = waiting.vm.qmp
    qmp.send("cpr-exec", command=program, test=True)
    qmp.send("query-name")
    wait_for((tmp_path / "hangs").exists, "it hangs")
    waiting.check(program)
    assert qmp.read_reply() == {"return": {"refusals": [INTERRUPTED]}}
    assert qmp.read_reply() == {"return": {}}, "in their order"
    waiting.end()


def test_others_are_served_before_an_update_by_hmp(start, tmp_path):
    waiting = Waiting(start, tmp_path)
    qmp = waiting.vm.qmp
    program = hanging(tmp_path, False)
    qmp.send("human-monitor-command", command_line=f"cpr-exec {' '.join(program)}")
    wait_for((tmp_path / "hangs").exists, "it hangs")
    waiting.check(program)
    assert qmp.read_reply() == {"return": f"Error: {INTERRUPTED}\r\n"}
    waiting.end()


def test_a_monitor_whose_command_waits_goes_on_in_order(start, tmp_path):
    waiting = Waiting(start, tmp_path)
    program = hanging(tmp_path, True)
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(waiting.monitor_path)
        monitor.sendall(f"cpr-exec -t {' '.join(program)}\ninfo status\n".encode())
        wait_for((tmp_path / "hangs").exists, "it hangs")
        waiting.check(program)
        text = ""
        while text.count("(qemu) ") < 3 or not text.endswith("(qemu) "):
            text += monitor.recv(1 << 16).decode()
    assert text.index(INTERRUPTED) < text.index("VM status: running")
    waiting.end()


ENDS_STARTED = """
import os
from cpr.migration.program import Held, end_started
from hung_mount import NUMBER
os.dup2(os.memfd_create("held"), NUMBER)
end_started(Held(NUMBER))
"""


def test_who_ends_what_a_program_has_started_asks_no_file_system(tmp_path):
    """One of them may hang, with a descriptor of any process on it."""
    with hung_mount.held(tmp_path):
        words = [sys.executable, "-c", ENDS_STARTED]
        subprocess.run(words, env=hung_mount.environment(), check=True, timeout=TIMEOUT)
