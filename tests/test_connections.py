"""The connections of clients over updates: no byte is lost, none comes twice."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.qmp import Qmp
from harness.vm import VMM, Vm
from waiting import wait_for, wait_for_change

from cpr.chardev.base import Chardev, create, fits
from cpr.chardev.socket import forget
from cpr.mainloop import MainLoop
from cpr.monitor.json_stream import JsonStream
from cpr.monitor.passed_fds import PassedFds
from cpr.monitor.readline import Readline
from cpr.state import connections
from cpr.state.connections import Kept

TIMEOUT = 20.0
MUCH = bytes(range(256)) * 4096  # more than small buffers take
SMALL = 4096


class Config:
    def __init__(self, backend: str, **options: Any) -> None:
        self.id = "char0"
        self.backend = backend
        self.options = {name.replace("_", "-"): value for name, value in options.items()}


@pytest.fixture
def loops() -> Iterator[tuple[MainLoop, MainLoop]]:
    """Of the old image, and of the new one."""
    both = MainLoop(), MainLoop()
    yield both
    for loop in both:
        loop.close()


def over(kept: Kept) -> Kept:
    """As it comes to another image, with descriptors of its own."""
    told = {"chardev:char0": kept}
    entries = [(name, number, os.dup(fd)) for name, number, fd in connections.descriptors(told)]
    return connections.decode(connections.encode(told), entries)["chardev:char0"]


def until(loop: MainLoop, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        loop.iterate(10_000_000)


def take_input(chardev: Chardev) -> bytearray:
    data = bytearray()
    chardev.set_handlers(lambda: 1 << 20, data.extend, lambda event: None, knows_peer=True)
    return data


def read_all(fd: int, loop: MainLoop, size: int) -> bytes:
    data = b""
    deadline = time.monotonic() + TIMEOUT
    while len(data) < size:
        assert time.monotonic() < deadline, f"{len(data)} of {size}"
        if select.select([fd], [], [], 0)[0]:
            data += os.read(fd, 1 << 16)
        loop.iterate(0)
    return data


def end(*chardevs: Chardev) -> None:
    for chardev in chardevs:
        chardev.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_server_with_a_client_that_does_not_read(loops, tmp_path, kind) -> None:
    path = str(tmp_path / "sock")
    options = {"path": path} if kind == "unix" else {"host": "127.0.0.1", "port": "0"}
    config = Config("socket", server=True, wait=False, **options)
    old = create(config, loops[0])
    listener = socket.socket(fileno=os.dup(old.exec_fds()[0]))
    address = listener.getsockname()
    client, second = socket.socket(listener.family), socket.socket(listener.family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    with listener, client, second:
        client.connect(address)
        until(loops[0], lambda: old.connected)
        second.connect(address)  # waits its turn
        old.write(MUCH)
        assert old.waiting
        client.sendall(b"half a ")
        kept = over(old.save())
        assert fits(config, kept)
        assert not fits(Config("socket", server=True, path="/other"), kept)
        assert not fits(Config("socket", server=True, cpr=False, **options), kept)
        new = create(config, loops[1], True, kept)
        data = take_input(new)
        new.write(b"end")
        client.sendall(b"line")
        until(loops[1], lambda: data == b"half a line")
        assert read_all(client.fileno(), loops[1], len(MUCH) + 3) == MUCH + b"end"
        assert not new.waiting
        client.close()
        until(loops[1], lambda: not new.connected)
        second.sendall(b", the next")
        until(loops[1], lambda: data == b"half a line, the next")
        end(new, old)
    assert not os.path.exists(path)


@pytest.mark.parametrize("since", ["before", "update", "spoken"])
def test_a_client_that_came_in_the_update_has_come_anew(loops, tmp_path, since) -> None:
    """The one that had waited before goes on to wait, as long as the other one is there; and so it
    does where that one has said something meanwhile."""
    path = str(tmp_path / "sock")
    old = create(Config("socket", server=True, wait=False, path=path), loops[0])
    with socket.socket(socket.AF_UNIX) as client, socket.socket(socket.AF_UNIX) as second:
        client.connect(path)
        until(loops[0], lambda: old.connected)
        if since == "before":
            second.connect(path)
        old.on_update()
        if since != "before":
            second.connect(path)
        second.sendall(b"second")
        if since == "spoken":
            client.sendall(b"first, ")
        kept = over(old.save())
        new = create(Config("socket", server=True, wait=False, path=path), loops[1], True, kept)
        data = take_input(new)
        if since == "update":
            until(loops[1], lambda: data == b"second")
        else:
            if since == "before":
                client.sendall(b"first, ")
            until(loops[1], lambda: data == b"first, ")
            client.close()
            until(loops[1], lambda: data == b"first, second")
        end(new, old)


@pytest.mark.parametrize("speaks", [False, True])
def test_a_silent_client_gives_way_to_one_that_connects_anew(loops, tmp_path, speaks) -> None:
    path = str(tmp_path / "sock")
    config = Config("socket", server=True, wait=False, path=path)
    old = create(config, loops[0])
    with socket.socket(socket.AF_UNIX) as client, socket.socket(socket.AF_UNIX) as second:
        client.connect(path)
        until(loops[0], lambda: old.connected)
        new = create(config, loops[1], True, over(old.save()))
        data = take_input(new)
        if speaks:
            client.sendall(b"still here")
            until(loops[1], lambda: data == b"still here")
        second.connect(path)
        second.sendall(b"anew")
        if speaks:
            for _ in range(20):
                loops[1].iterate(1_000_000)
            assert data == b"still here"
            client.sendall(b"!")
            until(loops[1], lambda: data == b"still here!")
        else:
            until(loops[1], lambda: data == b"anew")
            new.write(b"to you")
            assert read_all(second.fileno(), loops[1], 6) == b"to you"
        end(new, old)


def test_descriptors_that_were_passed_with_half_a_command(loops, tmp_path) -> None:
    path = str(tmp_path / "sock")
    config = Config("socket", server=True, wait=False, path=path)
    old = create(config, loops[0])
    data = take_input(old)
    with socket.socket(socket.AF_UNIX) as client, open(path + "-file", "w+b") as file:
        client.connect(path)
        socket.send_fds(client, [b"getfd"], [file.fileno()])
        until(loops[0], lambda: data == b"getfd")
        new = create(config, loops[1], True, over(old.save()))
        end(old)
        fd = new.take_fd()
        assert os.path.sameopenfile(fd, file.fileno())
        os.close(fd)
        end(new)


def test_what_is_not_there_any_more_is_closed(loops, tmp_path) -> None:
    path = str(tmp_path / "sock")
    old = create(Config("socket", server=True, wait=False, path=path), loops[0])
    kept = over(old.save())
    forget(kept)
    assert not kept.fds
    assert not os.path.exists(path)
    end(old)


def test_a_pty_stays_the_same(loops, capfd) -> None:
    config = Config("pty")
    old = create(config, loops[0])
    path = old.describe().removeprefix("pty:")
    slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
    until(loops[0], lambda: old.connected)
    much = MUCH[: 64 << 10]
    old.write(much)
    assert old.waiting
    capfd.readouterr()
    new = create(config, loops[1], True, over(old.save()))
    assert new.describe() == f"pty:{path}"
    assert capfd.readouterr().out == ""
    data = take_input(new)
    os.write(slave, b"typed")
    until(loops[1], lambda: data == b"typed")
    assert read_all(slave, loops[1], len(much)) == much
    os.close(slave)
    old.start_over()  # it must not write again what waits
    end(new, old)


def test_a_file_goes_on_where_it_was(loops, tmp_path) -> None:
    path = tmp_path / "log"
    config = Config("file", path=str(path))
    old = create(config, loops[0])
    old.write(b"before ")
    new = create(config, loops[1], True, over(old.save()))
    new.write(b"after")
    assert path.read_bytes() == b"before after"
    end(new, old)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return connections.decode(connections.encode({"x": Kept(state)}), [])["x"].data


@pytest.mark.parametrize(
    "text",
    [
        rb'{"execute": "query-name", "id": "\u00e4\"}"}',
        b'{"a": [1, {"b": 2.5e3}]} true {"c": \'\xc3\xa4\'}\n',
        b'{"a": nonsense} {"b": 1}\n',
        b'\xff{"b": 1}',
    ],
)
def test_json_that_is_cut_anywhere(text: bytes) -> None:
    def answers(*streams: JsonStream) -> list[str]:
        found = []
        for stream, part in zip(streams, (text[:cut], text[cut:]), strict=True):
            found += [repr(each) for each in stream.feed(part)]
        return found

    for cut in range(len(text) + 1):
        whole, first, second = JsonStream(), JsonStream(), JsonStream()
        before = [repr(each) for each in first.feed(text[:cut])]
        second.restore(through_json(first.save()))
        after = [repr(each) for each in second.feed(text[cut:])]
        assert before + after == answers(whole, whole)


def test_a_line_that_is_cut_anywhere() -> None:
    keys = b"one\rtw\xc3\xa4\x1b[Do\x1b[3~\x01x\x1b[A\x1b[B\x1b[A!\r"

    def editor() -> tuple[Readline, bytearray, list[str]]:
        screen = bytearray()
        lines: list[str] = []
        return Readline(screen.extend, lines.append, lambda line: ([], 0), ">"), screen, lines

    whole, screen, lines = editor()
    for key in keys:
        whole.feed(key)
    assert lines == ["one", "one!"]
    for cut in range(len(keys)):
        first, first_screen, first_lines = editor()
        second, second_screen, second_lines = editor()
        for key in keys[:cut]:
            first.feed(key)
        second.restore(through_json(first.save()))
        for key in keys[cut:]:
            second.feed(key)
        assert first_screen + second_screen == screen
        assert first_lines + second_lines == lines
        assert second.history == whole.history


def test_passed_descriptors_keep_their_numbers() -> None:
    old, new = PassedFds(), PassedFds()
    old.add("a: b", os.open("/dev/null", os.O_RDONLY))
    old.add_to_set(3, os.open("/dev/null", os.O_RDONLY), "why")
    old.add_to_set(3, os.open("/dev/null", os.O_WRONLY), None)
    told = old.query_sets()
    new.adopt(over(old.save()))
    old.close_all()
    assert new.query_sets() == told
    number = os.open("/dev/null", os.O_RDONLY)  # it may be one that a client knows
    set_id, known = new.add_to_set(None, number, None)
    assert (set_id, known not in [each["fd"] for each in told[0]["fds"]]) == (0, True)
    new.remove(3, told[0]["fds"][1]["fd"])
    with pytest.raises(OSError, match="denied"):
        new.find(3, True)
    os.close(new.take("a: b"))
    new.close_all()


# A VMM with clients of every kind.


class Typist:
    """Types line after line into the console guest, and checks each answer."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._socket.settimeout(TIMEOUT)
        self._ends = threading.Event()
        self.answered = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._socket.makefile("rb") as answers:
                while not self._ends.is_set():
                    number = self.answered + 1
                    self._socket.sendall(f"line {number}\n".encode())
                    answer = answers.readline()
                    while answer == b"ready\r\n":
                        answer = answers.readline()
                    assert answer == f"{number}: line {number}\r\n".encode()
                    self.answered = number
        except Exception as error:
            self.error = error

    def end(self) -> None:
        self._ends.set()
        self._thread.join(TIMEOUT)
        self._socket.close()
        assert self.error is None, self.error


class Hmp:
    """A person at an HMP monitor."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write

    def type(self, keys: str) -> None:
        os.write(self._write, keys.encode())

    def wait(self, text: str) -> str:
        """What is shown, up to `text` at its end."""
        shown = b""
        deadline = time.monotonic() + TIMEOUT
        while not shown.endswith(text.encode()):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._read], [], [], left)[0], shown
            data = os.read(self._read, 4096)
            assert data, f"closed after {shown!r}"
            shown += data
        return shown.decode()


FLOOD = 100  # commands with long answers


class Clients:
    """Those of one VM: each in the middle of something when an update comes."""

    def __init__(self, start: Any, accel: str, folder: Path) -> None:
        self.accepting = socket.create_server(("127.0.0.1", 0))
        port = self.accepting.getsockname()[1]
        self.paths = {name: f"{folder}/{name}" for name in ("com1", "half", "deaf", "new")}
        servers = [
            word
            for name, path in self.paths.items()
            for word in ("-chardev", f"socket,id={name},path={path},server=on,wait=off,cpr=on")
        ]
        self.words = [
            *("-nodefaults", "-display", "none", "-accel", accel, "-m", "64M"),
            *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on", "-name", "guest"),
            *("-drive", "file=examples/build/console.img,format=raw,if=floppy", *servers),
            *("-serial", "chardev:com1", "-mon", "half,mode=control", "-mon", "deaf,mode=control"),
            *("-mon", "new,mode=control", "-chardev", "stdio,id=stdio", "-mon", "stdio,cpr=on"),
            *("-chardev", "pty,id=pty,cpr=on", "-mon", "pty"),
            *("-chardev", f"socket,id=tcp,host=127.0.0.1,port={port},cpr=on", "-mon", "tcp"),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.vm: Vm = start(*self.words, **pipes)
        self.tcp, _ = self.accepting.accept()
        standard = self.vm.process
        banner = os.read(standard.stdout.fileno(), 4096).decode()
        path = banner.partition("redirected to ")[2].partition(" ")[0]
        self.slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
        self.people = [
            Hmp(standard.stdout.fileno(), standard.stdin.fileno()),
            Hmp(self.slave, self.slave),
            Hmp(self.tcp.fileno(), self.tcp.fileno()),
        ]
        for person in self.people[1:]:
            person.wait("(qemu) ")
        self.half, self.deaf = Qmp(self.paths["half"]), Qmp(self.paths["deaf"])
        self.new = socket.socket(socket.AF_UNIX)
        self.new.connect(self.paths["new"])
        assert b"QMP" in self.new.recv(4096)
        self.typist = Typist(self.paths["com1"])
        self.asked = 0

    def begin(self) -> None:
        """Half a command from each, and from one very many."""
        for person in self.people:
            person.type("info na")
            person.wait("info na\x1b[K")
        self.half.send_raw(b'{"execute": "query-na')
        self.new.sendall(b'{"execute": "no-such')
        requests = range(self.asked, self.asked + FLOOD)
        flood = "".join(
            json.dumps({"execute": "query-commands", "id": number}) for number in requests
        ).encode()
        self.asked += FLOOD
        threading.Thread(target=self.deaf.send_raw, args=(flood,), daemon=True).start()

    def finish(self) -> None:
        """The other half, and the answers, each once and in order."""
        for person in self.people:
            person.type("me\r")
            assert person.wait("(qemu) ").endswith("info name\x1b[K\r\nguest\r\n(qemu) ")
        self.half.send_raw(b'me", "id": "half"}')
        while "event" in (answer := self.half.read()):
            self.half.events.append(answer)
        assert answer == {"return": {"name": "guest"}, "id": "half"}
        self.new.sendall(b'"}')
        assert b"Expecting capabilities negotiation" in self.new.recv(4096)
        for number in range(self.asked - FLOOD, self.asked):
            while "event" in (answer := self.deaf.read()):
                self.deaf.events.append(answer)
            assert answer["id"] == number
            assert "return" in answer

    def close(self) -> None:
        self.tcp.close()
        self.accepting.close()
        self.new.close()
        os.close(self.slave)
        for stream in (self.vm.process.stdin, self.vm.process.stdout):
            stream.close()


def late(vm: Vm, command: list[str]) -> None:
    uri = f"file:{vm.directory}/state"
    words = [*command, "-incoming", uri]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=words)
    vm.qmp.command("migrate", uri=uri)


def wait_for_end(vm: Vm, pid: int, status: str) -> None:
    """Of the update, after which `pid` has the guest, maybe given back."""
    wait_for(
        lambda: (vm.processes(), vm.ask("query-migrate")["status"]) == ([pid], status),
        f"the update has {status}, and the process is the same",
    )


def test_clients_of_every_kind_go_on(start, accel, tmp_path) -> None:
    clients = Clients(start, accel, tmp_path)
    vm, typist = clients.vm, clients.typist
    with open("/dev/null") as file:
        told = clients.half.execute("add-fd", fds=(file.fileno(),))
        clients.half.execute("getfd", fds=(file.fileno(),), fdname="passed")
    sets = clients.half.command("query-fdsets")
    assert sets[0]["fds"] == [{"fd": told["return"]["fd"]}]
    typist.start()
    path = os.ttyname(clients.slave)
    own = [*VMM, *vm.words[len(VMM) :]]
    refused = [*own, "-no-such-option"]
    ways = [("early", own, "completed"), ("late", own, "completed")]
    if accel == "kvm":
        ways += [("early", refused, "failed"), ("late", refused, "failed")]
    for way, command, status in ways:
        clients.begin()
        pid, fd = vm.pid, vm.qmp
        if way == "early":
            vm.qmp.command("cpr-exec", command=command)
        else:
            late(vm, command)
        vm.reconnect()
        wait_for_end(vm, pid, status)
        assert (vm.qmp is fd) == (way == "early"), "its monitor has no cpr=on"
        clients.finish()
        wait_for_change(lambda: typist.answered, "the guest answers")
        assert f"pty: filename=pty:{path}" in vm.qmp.hmp("info chardev")
        assert clients.half.command("query-fdsets") == sets
    typist.end()
    assert clients.half.execute("closefd", fdname="passed") == {"return": {}}
    assert clients.half.command("query-status")["running"]
    clients.deaf.command("query-status")
    assert clients.half.events == clients.deaf.events, "one has missed an event"
    names = [event["event"] for event in clients.half.events]
    assert names == ["STOP", "RESUME"] * (len(names) // 2)
    assert len(names) // 2 >= len(ways)
    times = [tuple(event["timestamp"].values()) for event in clients.half.events]
    assert times == sorted(times)
    clients.close()


def test_what_the_new_vmm_has_otherwise(start, accel, tmp_path) -> None:
    """A monitor that becomes another one, or is gone: its client sees the end, its path is free."""
    paths = [str(tmp_path / name) for name in ("stays", "moves", "goes")]
    server = "server=on,wait=off"

    def monitors(*ids_and_paths: tuple[str, str]) -> list[str]:
        words = []
        for name, path in ids_and_paths:
            words += ["-chardev", f"socket,id={name},path={path},{server}", "-mon", name]
        return words

    stays, moves, goes = zip(("stays", "moves", "goes"), paths, strict=True)
    vm = start.guest("heartbeat", accel, *monitors(stays, moves, goes))
    clients = [socket.socket(socket.AF_UNIX) for _ in paths]
    for client, path in zip(clients, paths, strict=True):
        client.connect(path)
        client.settimeout(TIMEOUT)
        Hmp(client.fileno(), client.fileno()).wait("(qemu) ")
    base = ["examples/heartbeat.cfg", "-accel", accel, "-monitor", "none"]
    qmp = ["-qmp", f"unix:{vm.socket},{server}"]
    vm.update(command=[*VMM, *base, *monitors(stays, ("moves", paths[1] + "2")), *qmp])
    assert clients[1].recv(4096) == clients[2].recv(4096) == b""
    wait_for(lambda: os.path.exists(paths[1] + "2"), "it listens at the new path")
    assert [os.path.exists(path) for path in paths] == [True, False, False]
    clients[0].sendall(b"info status\r")
    assert clients[0].recv(4096)
    for client in clients:
        client.close()


OLDER = """
import sys
from cpr.live import transaction
transaction.VERSIONS = (transaction.PROTOCOL,)
from cpr.vmm.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_program_that_knows_nothing_of_it_gets_none(start, overlap) -> None:
    """An older version: clients connect again, as ever."""
    vm = start.guest(
        *("heartbeat", "kvm", "-global", f"migration.x-cpr-exec-overlap={overlap}"),
        *("-chardev", "stdio,id=kept,cpr=on", "-mon", "kept"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    person = Hmp(vm.process.stdout.fileno(), vm.process.stdin.fileno())
    person.wait("help' for more information\r\n(qemu) ")
    first = vm.qmp
    vm.update(command=[sys.executable, "-c", OLDER, "run", *vm.words[len(VMM) :]])
    assert vm.qmp is not first
    person.wait("help' for more information\r\n(qemu) ")
    assert vm.qmp.command("query-status")["running"]
    assert "cpr-connections" not in str(vm.descriptors())
    vm.update()
    assert vm.complaints == ""
    for stream in (vm.process.stdin, vm.process.stdout):
        stream.close()


def test_clients_of_a_new_vmm_that_then_fails(start, tmp_path) -> None:
    """With -incoming defer it talks to them before it has the guest: they connect again."""
    server = f"unix:{tmp_path}/kept,server=on,wait=off,cpr=on"
    vm = start.guest("heartbeat", "kvm", "-qmp", server)
    client = Qmp(f"{tmp_path}/kept")
    words = [*VMM, *vm.words[len(VMM) :], "-incoming", "defer"]
    client.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=words)
    client.command("migrate", uri=f"file:{tmp_path}/stream")
    wait_for(lambda: client.command("query-status")["status"] == "inmigrate", "it asks")
    (tmp_path / "nonsense").write_bytes(b"nonsense" * 100)
    client.send("migrate-incoming", uri=f"file:{tmp_path}/nonsense")
    client.wait_closed()
    client = Qmp(f"{tmp_path}/kept")
    wait_for(lambda: client.command("query-migrate")["status"] == "failed", "the old one has it")
    assert client.command("query-status")["running"]
    client.close()
