"""Chardevs: what goes in comes out, nothing is lost, and closing gives everything back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import pty
import resource
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import is_listening

from cpr.chardev.base import MAX_WAITING, Chardev, create
from cpr.chardev.socket import SocketChardev
from cpr.chardev.stream import BYTES_PER_ROUND, READ_SIZE
from cpr.constants import NS_PER_MS
from cpr.errors import ConfigError
from cpr.mainloop import READ, MainLoop

DEADLINE_S = 10
LARGE = 1 << 20  # bytes; no socket holds so many
LINE = bytes(100)


class Config:
    def __init__(self, backend: str, **options: Any) -> None:
        self.id = "char0"
        self.backend = backend
        self.options = {name.replace("_", "-"): value for name, value in options.items()}


def has_received(frontend, data):
    return frontend.data == data


class Frontend:
    """Takes at most `room` bytes until the test gives it more."""

    def __init__(self, chardev: Chardev, room: int = 1 << 20) -> None:
        self.room = room
        self.data = b""
        self.events: list[str] = []
        self.chardev = chardev
        chardev.set_handlers(lambda: self.room, self._receive, self.events.append)

    def _receive(self, data: bytes) -> None:
        assert len(data) <= self.room
        self.room -= len(data)
        self.data += data


@pytest.fixture
def loop() -> Iterator[MainLoop]:
    loop = MainLoop()
    yield loop
    loop.close()


def until(loop: MainLoop, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        loop.iterate(10_000_000)


def idle(loop: MainLoop, rounds: int = 5) -> None:
    for _ in range(rounds):
        loop.iterate(2_000_000)


def open_descriptors() -> dict[int, str]:
    names = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            names[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass
    return names


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    before = set(open_descriptors())
    yield
    left = {fd: name for fd, name in open_descriptors().items() if fd not in before}
    assert not left


def test_unknown_backend(loop: MainLoop) -> None:
    with pytest.raises(ConfigError, match="'bogus' is not a valid char driver name"):
        create(Config("bogus"), loop)


def test_null(loop: MainLoop) -> None:
    chardev = create(Config("null"), loop)
    frontend = Frontend(chardev)
    chardev.write(b"gone")
    assert frontend.events == ["opened"]
    assert chardev.describe() == "null"
    chardev.close()


# file


def test_file_truncates_or_appends(loop: MainLoop, tmp_path: Path) -> None:
    path = tmp_path / "log"
    for append, expected in ((False, b"one"), (True, b"oneone"), (False, b"one")):
        chardev = create(Config("file", path=str(path), append=append), loop)
        chardev.write(b"one")
        assert chardev.describe() == "file"
        chardev.close()
        assert path.read_bytes() == expected


def test_file_errors(loop: MainLoop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chardev: file: no filename given"):
        create(Config("file"), loop)
    with pytest.raises(ConfigError, match=f"Could not open '{tmp_path}': Is a directory"):
        create(Config("file", path=str(tmp_path)), loop)


# unix sockets


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(DEADLINE_S)
    client.connect(path)
    return client


def test_a_client_for_which_there_is_no_descriptor(
    monkeypatch: Any, loop: MainLoop, path: str
) -> None:
    def no_descriptor(*arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", no_descriptor)
    with pytest.raises(ConfigError, match=f"Failed to connect to '{path}': Too many open files"):
        create(Config("socket", path=path), loop)


def server(loop: MainLoop, path: str) -> Chardev:
    return create(Config("socket", path=path, server=True, wait=False), loop)


def test_server_talks_to_one_client_after_the_other(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    frontend = Frontend(chardev)
    assert chardev.describe() == f"disconnected:unix:{path},server=on"
    chardev.write(b"nobody hears this")
    first, second = connect(path), connect(path)
    second.send(b"second")
    first.send(b"first")
    until(loop, lambda: frontend.data == b"first")
    assert chardev.describe() == f"unix:{path},server=on"
    chardev.write(b"hello first")
    assert first.recv(100) == b"hello first"
    first.close()
    until(loop, lambda: frontend.data == b"firstsecond")
    chardev.write(b"hello second")
    assert second.recv(100) == b"hello second"
    second.close()
    until(loop, lambda: not chardev.connected)
    assert frontend.events == ["opened", "closed", "opened", "closed"]
    chardev.close()
    assert not os.path.exists(path)


def test_a_listening_path_is_for_its_owner_only(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    chardev.close()


def test_a_client_waits_where_no_descriptor_is_left(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    client = connect(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 1, hard))
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    try:
        rounds = 0
        end = time.monotonic() + 0.15
        while time.monotonic() < end:
            loop.iterate(10_000_000)
            rounds += 1
        assert rounds < 50, "it asks for the client without a pause"
        assert not chardev.connected
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until(loop, lambda: chardev.connected)
    client.close()
    chardev.close()


def test_server_takes_a_path_that_is_left_over(loop: MainLoop, path: str) -> None:
    Path(path).write_text("an old file")
    chardev = server(loop, path)
    other = server(loop, path)  # as a new image does while the old one's socket is still there
    chardev.close()
    client = connect(path)
    client.close()
    other.close()


def test_server_errors(loop: MainLoop, tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "sock")
    with pytest.raises(ConfigError, match=f"bind socket to {missing}: No such file or directory"):
        server(loop, missing)
    with pytest.raises(ConfigError, match=f"Failed to unlink socket {tmp_path}: Is a directory"):
        server(loop, str(tmp_path))
    with pytest.raises(ConfigError, match="is too long\nPath must be less than 108 bytes"):
        server(loop, "/" + "x" * 108)


def test_wait_blocks_until_a_client_is_there(
    loop: MainLoop, path: str, capfd: pytest.CaptureFixture
) -> None:
    clients = []

    def come_later() -> None:
        while not is_listening(path):
            time.sleep(0.001)
        clients.append(connect(path))

    thread = threading.Thread(target=come_later)
    thread.start()
    chardev = create(Config("socket", path=path, server=True), loop)
    thread.join()
    assert chardev.connected
    expected = f"QEMU waiting for connection on: disconnected:unix:{path},server=on"
    assert expected in capfd.readouterr().err
    clients[0].close()
    chardev.close()


def test_input_waits_until_the_frontend_has_room(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    frontend = Frontend(chardev, room=3)
    client = connect(path)
    client.send(b"abcdefgh")
    until(loop, lambda: frontend.data == b"abc")
    idle(loop)
    assert frontend.data == b"abc"
    frontend.room = 2
    chardev.accept_input()
    until(loop, lambda: frontend.data == b"abcde")
    client.close()  # what it has sent is still to be had
    idle(loop)
    assert chardev.connected
    frontend.room = 100
    chardev.accept_input()
    until(loop, lambda: frontend.events[-1] == "closed")
    assert frontend.data == b"abcdefgh"
    chardev.close()


def test_a_client_that_left_makes_room_also_while_input_is_stopped(
    loop: MainLoop, path: str
) -> None:
    chardev = server(loop, path)
    frontend = Frontend(chardev, room=0)
    first = connect(path)
    until(loop, lambda: chardev.connected)
    first.close()
    until(loop, lambda: frontend.events[-1] == "closed")
    second = connect(path)
    until(loop, lambda: chardev.connected)
    second.close()
    chardev.close()


def test_output_waits_for_a_slow_client(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    Frontend(chardev)
    client = connect(path)
    until(loop, lambda: chardev.connected)
    pieces = [bytes([65 + i % 26]) * 50_000 for i in range(40)]
    for piece in pieces:  # far more than the socket's buffer takes
        chardev.write(piece)
    received = b""
    while len(received) < 2_000_000:
        loop.iterate(1_000_000)
        received += client.recv(65536)
    assert received == b"".join(pieces)
    client.close()
    chardev.close()


def test_output_for_a_client_that_never_reads_is_bounded(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    Frontend(chardev)
    client = connect(path)
    until(loop, lambda: chardev.connected)
    for _ in range(2 * MAX_WAITING // 100_000):
        chardev.write(bytes(100_000))
    assert MAX_WAITING <= chardev.waiting <= MAX_WAITING + 100_000
    chardev.flush()
    assert chardev.waiting
    client.close()
    until(loop, lambda: not chardev.connected)
    assert not chardev.waiting
    chardev.close()


@pytest.mark.parametrize("leaves", [False, True])
def test_a_frontend_may_keep_what_does_not_go_out_at_once(
    loop: MainLoop, path: str, leaves: bool
) -> None:
    chardev = server(loop, path)
    told: list[int] = []
    chardev.set_handlers(lambda: 1, lambda data: None, lambda event: None, lambda: told.append(1))
    assert chardev.try_write(b"nobody is there") == 15
    client = connect(path)
    until(loop, lambda: chardev.connected)
    sent = 0
    while (taken := chardev.try_write(bytes(65536))) == 65536:
        sent += taken
    sent += taken
    assert chardev.try_write(b"x") == 0 and not chardev.waiting
    idle(loop)
    assert not told
    if leaves:
        client.close()
        until(loop, lambda: told)
    else:
        while sent:
            sent -= len(client.recv(1 << 20))
        until(loop, lambda: told)
        assert chardev.try_write(b"x") == 1
        client.close()
    chardev.close()


def test_a_flood_of_input_leaves_the_others_their_turn(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    frontend = Frontend(chardev)
    client = connect(path)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(65536))
    until(loop, lambda: frontend.data)
    while frontend.data:
        frontend.data = b""
        loop.iterate(0)
        assert len(frontend.data) <= BYTES_PER_ROUND + READ_SIZE
    client.close()
    chardev.close()


def test_room_that_is_made_while_the_watch_is_set_is_not_missed(
    loop: MainLoop, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chardev = server(loop, path)
    frontend = Frontend(chardev, room=1)
    client = connect(path)
    until(loop, lambda: chardev.connected)
    watch = loop.watch

    def watch_while_a_vcpu_reads(fd: int, events: int, callback: Callable[[int], None]) -> None:
        watch(fd, events, callback)
        if not frontend.room:
            frontend.room = 1
            chardev.accept_input()

    monkeypatch.setattr(loop, "watch", watch_while_a_vcpu_reads)
    client.send(b"abc")
    until(loop, lambda: frontend.data == b"abc")
    client.close()
    chardev.close()


def test_flush_waits_for_a_slow_client(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    client = connect(path)
    until(loop, lambda: chardev.connected)
    chardev.write(b"x" * 1_000_000)
    received: list[bytes] = []

    def read_all() -> None:
        while sum(map(len, received)) < 1_000_000:
            received.append(client.recv(65536))

    thread = threading.Thread(target=read_all)
    thread.start()
    chardev.flush(DEADLINE_S * 1_000_000_000)  # without the loop, as before an exec
    thread.join()
    assert sum(map(len, received)) == 1_000_000
    client.close()
    chardev.close()


def test_writes_from_other_threads_keep_their_order(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    client = connect(path)
    until(loop, lambda: chardev.connected)
    lines = [b"%07d\n" % number for number in range(100_000)]

    def write_all() -> None:
        for line in lines:
            chardev.write(line)

    thread = threading.Thread(target=write_all)
    thread.start()
    received = b""
    while len(received) < 800_000:
        loop.iterate(1_000_000)
        client.setblocking(False)
        try:
            received += client.recv(65536)
        except BlockingIOError:
            pass
    thread.join()
    assert received == b"".join(lines)
    client.close()
    chardev.close()


def test_a_client_that_dies_is_no_error(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    frontend = Frontend(chardev)
    client = connect(path)
    until(loop, lambda: chardev.connected)
    client.close()
    chardev.write(b"too late")
    until(loop, lambda: not chardev.connected)
    assert frontend.events == ["opened", "closed"]
    chardev.close()


def test_passed_descriptors(loop: MainLoop, path: str) -> None:
    chardev = server(loop, path)
    frontend = Frontend(chardev)
    client = connect(path)
    read_end, write_end = os.pipe()
    assert chardev.take_fd() == -1
    socket.send_fds(client, [b"one"], [write_end])
    until(loop, lambda: frontend.data == b"one")
    socket.send_fds(client, [b"two"], [write_end, write_end])  # the first message's is closed
    until(loop, lambda: frontend.data == b"onetwo")
    passed = chardev.take_fd()
    assert fcntl.fcntl(passed, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.write(passed, b"through it")
    assert os.read(read_end, 100) == b"through it"
    assert chardev.take_fd() == -1
    socket.send_fds(client, [b"three"], [write_end])
    until(loop, lambda: frontend.data == b"onetwothree")
    client.close()
    until(loop, lambda: not chardev.connected)
    assert chardev.take_fd() == -1  # nobody took it, it went with the client
    for fd in (passed, read_end, write_end):
        os.close(fd)
    chardev.close()


def test_descriptors_are_close_on_exec(loop: MainLoop, path: str) -> None:
    before = set(open_descriptors())
    chardev = server(loop, path)
    client = connect(path)
    until(loop, lambda: chardev.connected)
    client.set_inheritable(True)
    mine = client.fileno()
    for fd in set(open_descriptors()) - before - {mine}:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    client.close()
    chardev.close()


# clients and TCP


def test_client(loop: MainLoop, path: str) -> None:
    with pytest.raises(ConfigError, match=f"connect to '{path}': No such file or directory"):
        create(Config("socket", path=path), loop)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    chardev = create(Config("socket", path=path), loop)
    peer, _ = listener.accept()
    frontend = Frontend(chardev)
    assert chardev.describe() == f"unix:{path}"
    peer.send(b"in")
    until(loop, lambda: frontend.data == b"in")
    peer.close()
    until(loop, lambda: frontend.events == ["opened", "closed"])
    chardev.close()
    listener.close()


def test_reconnect(loop: MainLoop, path: str) -> None:
    chardev = create(Config("socket", path=path, reconnect_ms=10), loop)
    frontend = Frontend(chardev)
    assert not chardev.connected
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    until(loop, lambda: chardev.connected)
    listener.accept()[0].close()
    until(loop, lambda: frontend.events == ["opened", "closed", "opened"])
    chardev.close()
    listener.close()


def test_tcp(loop: MainLoop) -> None:
    chardev = create(
        Config("socket", host="127.0.0.1", port="0", server=True, wait=False, nodelay=True), loop
    )
    port = chardev.describe().removeprefix("disconnected:tcp:127.0.0.1:").removesuffix(",server=on")
    client = socket.create_connection(("127.0.0.1", int(port)))
    until(loop, lambda: chardev.connected)
    own = client.getsockname()[1]
    assert chardev.describe() == f"tcp:127.0.0.1:{port},server=on <-> 127.0.0.1:{own}"
    with pytest.raises(ConfigError) as refused:
        create(Config("socket", host="127.0.0.1", port=port, server=True, wait=False), loop)
    assert str(refused.value).startswith(
        f"Failed to find an available port: Address already in use; 127.0.0.1:{port} is taken"
    )
    client.close()
    chardev.close()
    with pytest.raises(ConfigError) as refused:
        create(Config("socket", host="127.0.0.1", port=port), loop)
    assert str(refused.value) == f"Failed to connect to '127.0.0.1:{port}': Connection refused"


def test_a_server_that_accepts_nobody_keeps_no_client_waiting(loop: MainLoop, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(ConfigError, match=r"Failed to connect to.*temporarily unavailable"):
            create(Config("socket", path=path), loop)
        chardev = create(Config("socket", path=path, reconnect_ms=10), loop)
        for _ in range(3):
            loop.iterate(None)
        assert not chardev.connected
        listener.accept()[0].close()
        while not chardev.connected:
            loop.iterate(None)
        chardev.close()


def test_tcp_client_reconnects_in_the_background(loop: MainLoop) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    chardev = create(Config("socket", host="127.0.0.1", port=str(port), reconnect_ms=10), loop)
    until(loop, lambda: chardev.connected)
    peer, address = listener.accept()
    assert chardev.describe() == f"tcp:127.0.0.1:{address[1]} <-> 127.0.0.1:{port}"
    peer.close()
    until(loop, lambda: not chardev.connected)
    until(loop, lambda: chardev.connected)
    chardev.close()
    listener.close()


def test_a_connection_that_is_being_made_is_given_up_for_an_exec(loop: MainLoop) -> None:
    """The number of its descriptor becomes that of another file, which is watched as any other."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):  # there is no room for a second one
        chardev = create(Config("socket", host="127.0.0.1", port=str(port), reconnect_ms=10), loop)
        assert isinstance(chardev, SocketChardev)
        idle(loop)
        waiting = chardev._connecting
        assert waiting is not None
        number = waiting.fileno()
        chardev.forget_exec_fds()
        assert waiting.fileno() < 0
        reader, writer = os.pipe()
        os.dup2(reader, number)
        seen: list[bytes] = []
        loop.watch(number, READ, lambda events: seen.append(os.read(number, 10)))
        os.write(writer, b"here")
        until(loop, lambda: seen)
        loop.unwatch(number)
        for fd in {reader, writer, number}:
            os.close(fd)
        chardev.close()
    listener.close()


def test_a_half_closed_client_reads_on(loop: MainLoop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    chardev = create(Config("socket", path=path, server=True, wait=False), loop)
    frontend = Frontend(chardev, room=3)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b"commands")
        until(loop, lambda: frontend.data == b"com")
        client.shutdown(socket.SHUT_WR)
        idle(loop)
        chardev.write(b"x" * LARGE)
        assert chardev.waiting
        frontend.room = 100
        chardev.accept_input()
        until(loop, lambda: frontend.data == b"commands")
        idle(loop)
        assert chardev.connected
        client.setblocking(False)
        got = bytearray()

        def read() -> bool:
            with contextlib.suppress(BlockingIOError):
                got.extend(client.recv(1 << 16))
            return len(got) == LARGE

        until(loop, read)
        until(loop, lambda: not chardev.connected)
    chardev.close()


def test_a_client_that_has_gone_gives_way_where_nobody_reads_it(
    loop: MainLoop, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    chardev = create(Config("socket", path=path, server=True, wait=False), loop)
    Frontend(chardev, room=0)
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(path)
        first.sendall(b"typed")
        until(loop, lambda: chardev.connected)
    idle(loop)
    with socket.socket(socket.AF_UNIX) as second:
        second.connect(path)
        until(loop, lambda: is_served(chardev, second))
    chardev.close()


def is_served(chardev: Chardev, client: socket.socket) -> bool:
    chardev.write(b"!")
    client.setblocking(False)
    try:
        return client.recv(1) == b"!"
    except BlockingIOError:
        return False


def test_a_listener_without_descriptors_does_not_come_back_for_another(
    loop: MainLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "socket")
    chardev = create(Config("socket", path=path, server=True, wait=False), loop)
    assert isinstance(chardev, SocketChardev)
    Frontend(chardev)
    monkeypatch.setattr("cpr.chardev.socket.RETRY_NS", 20_000_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            until(loop, lambda: chardev._timer is not None)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        chardev._watch_listener()  # as where another client has gone
        until(loop, lambda: chardev.connected)
        assert chardev._timer is None
        second.connect(path)
        idle(loop, 50)
        assert is_served(chardev, first)
    chardev.close()


def test_after_an_exec_nobody_is_waited_for(loop: MainLoop, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=r"Could not open '.*fifo': No such device or address"):
        create(Config("file", path=str(tmp_path / "fifo")), loop, after_exec=True)
    path = str(tmp_path / "socket")
    chardev = create(Config("socket", path=path, server=True), loop, after_exec=True)
    assert not chardev.connected
    chardev.close()


def test_a_peer_that_has_reset_the_connection_is_described(loop: MainLoop) -> None:
    chardev = create(Config("socket", host="127.0.0.1", port="0", server=True, wait=False), loop)
    Frontend(chardev, room=0)
    port = int(chardev.describe().split(":")[3].split(",")[0])
    client = socket.create_connection(("127.0.0.1", port))
    until(loop, lambda: chardev.connected)
    client.sendall(b"unread")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert chardev.describe() == f"tcp:127.0.0.1:{port},server=on <-> disconnected"
    chardev.close()


def test_addresses_that_do_not_exist(loop: MainLoop) -> None:
    with pytest.raises(ConfigError, match=r"^address resolution failed for \[::x\]:1: "):
        create(Config("socket", host="[::x]", port="1"), loop)
    with pytest.raises(ConfigError, match="Failed to bind socket: Cannot assign requested"):
        create(Config("socket", host="192.0.2.1", port="5597", server=True, wait=False), loop)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"path": "x", "host": "y"}, "None or one of 'path', 'fd' or 'host' option required."),
        ({"host": "y"}, "chardev: socket: no port given"),
        (
            {"path": "x", "server": True, "reconnect_ms": 1},
            "'reconnect-ms' option is incompatible with socket in server listen mode",
        ),
        (
            {"path": "x", "wait": True},
            "'wait' option is incompatible with socket in client connect mode",
        ),
        ({"path": "x", "server": "maybe"}, "Parameter 'server' expects 'on' or 'off'"),
    ],
)
def test_option_errors(loop: MainLoop, options: dict, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        create(Config("socket", **options), loop)
    assert str(refused.value) == text


# pty


def test_pty_survives_closing_and_opening(loop: MainLoop, capfd: pytest.CaptureFixture) -> None:
    chardev = create(Config("pty"), loop)
    frontend = Frontend(chardev)
    path = chardev.describe().removeprefix("pty:")
    assert capfd.readouterr().out == f"char device redirected to {path} (label char0)\n"
    chardev.write(b"nobody sees this")
    for number in (1, 2):
        slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
        until(loop, lambda: chardev.connected)
        assert termios.tcgetattr(slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
        os.write(slave, b"typed\r")
        typed = b"typed\r" * number
        until(loop, functools.partial(has_received, frontend, typed))
        chardev.write(b"shown\n")
        assert os.read(slave, 100) == b"shown\n"
        os.close(slave)
        until(loop, lambda: not chardev.connected)
    assert frontend.events == ["opened", "closed"] * 2
    chardev.close()


def takes_all(chardev: Chardev) -> bool:
    """More than the kernel would keep for a reader."""
    return all(chardev.try_write(LINE) == len(LINE) for _ in range(1000))


def test_pty_closed_before_its_input_is_read(loop: MainLoop) -> None:
    """Its user reads nothing any more: the guest's output goes on, and its input is kept."""
    chardev = create(Config("pty"), loop)
    frontend = Frontend(chardev, room=0)
    path = chardev.describe().removeprefix("pty:")
    slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
    until(loop, lambda: chardev.connected)
    os.write(slave, b"typed\r")
    while chardev.try_write(LINE) == len(LINE):
        pass
    os.close(slave)
    until(loop, lambda: takes_all(chardev))
    rounds, over = 0, []
    loop.call_later(50 * NS_PER_MS, lambda: over.append(True))
    while not over:
        loop.iterate(None)
        rounds += 1
    assert rounds < 100, "the loop goes round and round"
    slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
    until(loop, lambda: frontend.events == ["opened", "closed", "opened"])
    termios.tcflush(slave, termios.TCIFLUSH)  # what the kernel has kept for whoever comes
    until(loop, lambda: chardev.try_write(b"shown\n"))
    assert os.read(slave, 100) == b"shown\n"
    frontend.room = 100
    chardev.accept_input()
    until(loop, functools.partial(has_received, frontend, b"typed\r"))
    os.close(slave)
    until(loop, lambda: not chardev.connected)
    chardev.close()


def test_pty_whose_user_has_gone_is_closed_when_its_input_is_read(loop: MainLoop) -> None:
    chardev = create(Config("pty"), loop)
    frontend = Frontend(chardev, room=0)
    slave = os.open(chardev.describe().removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    until(loop, lambda: chardev.connected)
    os.write(slave, b"typed\r")
    os.close(slave)
    until(loop, lambda: takes_all(chardev))
    frontend.room = 100
    chardev.accept_input()
    until(loop, lambda: not chardev.connected)
    assert (frontend.data, frontend.events) == (b"typed\r", ["opened", "closed"])
    chardev.close()


def test_pty_closed_while_open(loop: MainLoop) -> None:
    chardev = create(Config("pty"), loop)
    slave = os.open(chardev.describe().removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    until(loop, lambda: chardev.connected)
    chardev.close()
    os.close(slave)


# stdio, in a process of its own

PROGRAM = """
import sys
from cpr.chardev.base import create
from cpr.mainloop import MainLoop

class Config:
    id, backend, options = "char0", "stdio", {options}

loop = MainLoop()
chardev = create(Config, loop, {after_exec})
try:
    create(Config, loop)
except Exception as error:
    assert str(error) == "cannot use stdio by multiple character devices"
room = [1]
def receive(data):
    if b"q" in data:
        room[0] = 0
    chardev.write(b"<" + data + b">")
    if b"q" in data:
        loop.stop()
    if b"!" in data:
        raise SystemExit(3)
def event(name):
    chardev.write(name.encode())
    if name == "closed":
        loop.stop()
chardev.set_handlers(lambda: room[0], receive, event)
loop.run()
chardev.write(b"end")
chardev.close()
"""


def program(options: dict | None = None, after_exec: bool = False) -> list[str]:
    text = PROGRAM.format(options=options or {}, after_exec=after_exec)
    return [sys.executable, "-c", text]


class Terminal:
    """A process on a pty whose other end is ours."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            program(*arguments, **keywords),
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
        )

    def expect(self, text: bytes) -> None:
        output = b""
        while text not in output:
            output += os.read(self.master, 1000)

    def flags(self) -> int:
        return termios.tcgetattr(self.slave)[3]

    def end(self) -> int:
        status = self.process.wait(DEADLINE_S)
        os.close(self.master)
        os.close(self.slave)
        return status


def test_stdio_on_a_terminal() -> None:
    terminal = Terminal()
    terminal.expect(b"opened")
    iflag, oflag, _, lflag = terminal.before[:4]
    after = termios.tcgetattr(terminal.slave)
    assert lflag & ~after[3] == termios.ICANON | termios.ECHO | termios.IEXTEN
    assert after[3] & termios.ISIG
    assert not after[0] & (termios.ICRNL | termios.IXON)
    assert after[1] == oflag
    assert iflag & termios.ICRNL
    os.write(terminal.master, b"a\r")
    terminal.expect(b"<a><\r>")
    assert os.get_blocking(terminal.slave)  # the shell's description is not touched
    os.write(terminal.master, b"q")
    terminal.expect(b"end")
    terminal.process.wait(DEADLINE_S)
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert terminal.end() == 0


SHELL = """
import fcntl, os, subprocess, sys, termios, time
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
job = subprocess.Popen(sys.argv[1:], process_group=0)
print("started", flush=True)
sys.stdin.readline()
os.tcsetpgrp(0, job.pid)
status = os.waitpid(job.pid, os.WUNTRACED)[1]
os._exit(9 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
"""


def test_stdio_in_the_background_is_not_stopped_and_reads_nothing() -> None:
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        [sys.executable, "-c", SHELL, *program()], stdin=slave, stdout=slave, stderr=slave
    )
    output = b""

    def expect(text: bytes) -> None:
        nonlocal output
        while text not in output:
            output += os.read(master, 1000)
        output = output.partition(text)[2]

    expect(b"started")
    expect(b"opened")
    assert termios.tcgetattr(slave)[3] & termios.ICANON, "the terminal is the shell's"
    os.write(master, b"fg\n")  # for the shell, which makes it the foreground job
    end = time.monotonic() + DEADLINE_S
    while termios.tcgetattr(slave)[3] & termios.ICANON:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.write(master, b"aq")
    expect(b"<a>")
    expect(b"end")
    assert shell.wait(DEADLINE_S) == 0
    os.close(master)
    os.close(slave)


def test_stdio_without_signals() -> None:
    terminal = Terminal({"signal": False})
    terminal.expect(b"opened")
    assert not terminal.flags() & termios.ISIG
    os.write(terminal.master, b"\x03\x04")
    terminal.expect(b"<\x03><\x04>")
    os.write(terminal.master, b"q")
    assert terminal.end() == 0


def test_stdio_gives_the_terminal_back_after_an_exception() -> None:
    terminal = Terminal()
    terminal.expect(b"opened")
    os.write(terminal.master, b"!")
    terminal.process.wait(DEADLINE_S)
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert terminal.end() == 3


def test_stdio_after_an_exec_gives_back_a_usual_terminal() -> None:
    first = Terminal()
    first.expect(b"opened")
    first.process.kill()  # as an exec: nothing is restored
    first.process.wait(DEADLINE_S)
    found = first.flags()
    assert not found & termios.ICANON
    first.process = subprocess.Popen(
        program(after_exec=True), stdin=first.slave, stdout=first.slave, start_new_session=True
    )
    first.expect(b"opened")
    assert first.flags() == found
    os.write(first.master, b"q")
    first.process.wait(DEADLINE_S)
    assert termios.tcgetattr(first.slave) == first.before
    assert first.end() == 0


@pytest.mark.parametrize("kind", ["file", "null", "pipe", "socket"])
def test_stdio_input_ends_but_output_goes_on(kind: str, tmp_path: Path) -> None:
    expected = b"opened<a><b><\n>closedend"
    peer = -1
    if kind == "file":
        (tmp_path / "in").write_bytes(b"ab\n")
        source = os.open(tmp_path / "in", os.O_RDONLY)
        os.lseek(source, 1, os.SEEK_SET)
        expected = expected.replace(b"<a>", b"")
    elif kind == "null":
        source = os.open(os.devnull, os.O_RDONLY)
        expected = b"openedclosedend"
    elif kind == "pipe":
        source, peer = os.pipe()
    else:
        source, peer = (end.detach() for end in socket.socketpair())
    if peer >= 0:
        os.write(peer, b"ab\n")
        os.close(peer)
    result = subprocess.run(
        program(), stdin=source, stdout=subprocess.PIPE, timeout=DEADLINE_S, check=True
    )
    assert result.stdout == expected
    assert os.get_blocking(source)  # where it was made non-blocking, that was given back
    os.close(source)


def test_stdio_leaves_what_it_did_not_read_to_the_next_process(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abq typed ahead\n")
    with open(tmp_path / "in", "rb") as source:
        subprocess.run(program(), stdin=source, stdout=subprocess.DEVNULL, check=True)
        assert os.read(source.fileno(), 100) == b" typed ahead\n"


def test_stdio_survives_a_closed_reader() -> None:
    process = subprocess.Popen(program(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.read(6)
    process.stdout.close()
    process.stdin.write(b"abcq")
    process.stdin.close()
    assert process.wait(DEADLINE_S) == 0
