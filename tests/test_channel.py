"""Migration channels: bytes through each kind of them, peers that do nothing, inputs that no
system call takes."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from descriptors import open_fds

from cpr.errors import MigrationError
from cpr.migration import address as addresses
from cpr.migration import channel
from cpr.migration.cancellation import Cancellation
from cpr.migration.channel import Channel, open_incoming, open_outgoing
from cpr.migration.listener import Listener
from cpr.monitor.passed_fds import PassedFds
from cpr.pages import PagePool, Pages, RecordWriter

NEVER = Cancellation()

DEADLINE_S = 20
MORE_THAN_A_PIPE = bytes(4 << 20)


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    before = len(open_fds())
    yield
    assert len(open_fds()) == before


@pytest.fixture
def handed() -> Iterator[PassedFds]:
    fds = PassedFds()
    yield fds
    fds.close_all()


class Peer:
    """A channel, and the descriptor at its other end, which does nothing."""

    def __init__(self, made: Channel, other: int, child: int = 0) -> None:
        self.channel = made
        self.other = other
        self.child = child

    def close(self) -> None:
        self.channel.close()
        if self.other >= 0:
            os.close(self.other)


def socket_peer(writing: bool) -> Peer:
    ours, other = (end.detach() for end in socket.socketpair())
    return Peer(Channel(ours, "socket"), other)


def pipe_peer(writing: bool) -> Peer:
    reader, writer = os.pipe()
    ours, other = (writer, reader) if writing else (reader, writer)
    return Peer(Channel(ours, "file"), other)


def sleeping_child(writing: bool) -> Peer:
    args = ["/bin/sh", "-c", "sleep 1000; true"]  # the shell waits for one that has the pipe too
    opened = channel._spawn(args, writing)
    assert opened._child is not None
    return Peer(opened, -1, opened._child._process.pid)


STALLED = [socket_peer, pipe_peer, sleeping_child]


def in_thread(action: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("kind", STALLED)
@pytest.mark.parametrize("early", [False, True])
def test_a_write_that_nobody_reads_is_ended(kind: Callable[[bool], Peer], early: bool) -> None:
    peer = kind(True)
    if early:
        peer.channel.shutdown()
    thread, raised = in_thread(lambda: peer.channel.write(MORE_THAN_A_PIPE))
    if not early:
        thread.join(0.1)
        assert thread.is_alive()
        peer.channel.shutdown()
    thread.join(DEADLINE_S)
    assert isinstance(raised[0], OSError) and raised[0].errno in (errno.ECANCELED, errno.EPIPE)
    peer.close()
    assert_gone(peer.child)


@pytest.mark.parametrize("kind", STALLED)
def test_a_read_that_nobody_writes_is_ended(kind: Callable[[bool], Peer]) -> None:
    peer = kind(False)
    read: list[bytes] = []
    thread, raised = in_thread(lambda: read.append(peer.channel.read(10)))
    thread.join(0.1)
    assert thread.is_alive()
    peer.channel.shutdown()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert isinstance(raised[0], MigrationError)
    assert str(raised[0]) == f"Unable to read from {peer.channel.kind}: Operation canceled"
    peer.close()
    assert_gone(peer.child)


@pytest.mark.parametrize("kind", STALLED)
def test_pages_that_nobody_reads_are_ended_too(kind: Callable[[bool], Peer]) -> None:
    peer = kind(True)
    memory = bytearray(b"x" * (16 << 20))
    from cpr._native._cpr import ffi

    host = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    pages = Pages("ram", host, len(memory) // 4096)
    peer.channel.call_on_shutdown(pages.cancel)
    with PagePool() as pool:
        writer = RecordWriter(pool, pages, "ram")
        thread, raised = in_thread(lambda: writer.write(peer.channel.fd))
        thread.join(0.1)
        assert thread.is_alive()
        peer.channel.shutdown()
        thread.join(DEADLINE_S)
        assert not thread.is_alive() and raised
    peer.close()


def assert_gone(pid: int) -> None:
    if not pid:
        return
    end = time.monotonic() + DEADLINE_S
    while psutil.pid_exists(pid):
        assert time.monotonic() < end, "the command lives, or is a zombie"
        time.sleep(0.01)


def test_a_command_that_does_not_end_is_not_waited_for() -> None:
    peer = sleeping_child(True)
    thread, raised = in_thread(peer.channel.finish)
    thread.join(0.1)
    assert thread.is_alive()
    peer.channel.shutdown()
    thread.join(DEADLINE_S)
    assert isinstance(raised[0], OSError)
    peer.close()
    assert_gone(peer.child)
    peer = sleeping_child(False)
    peer.close()
    assert psutil.pid_exists(peer.child)
    os.killpg(peer.child, signal.SIGKILL)
    assert_gone(peer.child)


def test_shutdown_at_any_time_touches_no_other_file() -> None:
    peer = socket_peer(True)
    peer.close()
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]  # the numbers that were closed
    peer.channel.shutdown()
    for fd in fds:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)


def test_the_command_has_neither_stdin_nor_stdout_of_ours(
    handed: PassedFds, tmp_path: Path
) -> None:
    words = "in=$(readlink /proc/$$/fd/0); out=$(readlink /proc/$$/fd/1); "
    words += f"echo $in >{tmp_path}/0; echo $out >{tmp_path}/1"
    address = addresses.parse_uri(f"exec:{words}; cat >/dev/null")
    made = open_outgoing(address, handed, NEVER)
    made.write(b"state")
    made.finish()
    assert (tmp_path / "0").read_text().startswith("pipe:")
    assert (tmp_path / "1").read_text() == "/dev/null\n"
    made = open_incoming(address, handed)
    assert made.read(10) == b""
    made.close()
    end = time.monotonic() + DEADLINE_S
    while not (tmp_path / "1").read_text().startswith("pipe:"):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (tmp_path / "0").read_text() == "/dev/null\n"


def test_a_command_that_fails(handed: PassedFds) -> None:
    made = open_outgoing(addresses.parse_uri("exec:cat >/dev/null; exit 3"), handed, NEVER)
    made.write(b"state")
    with pytest.raises(BrokenPipeError):
        made.finish()
    made.close()
    with pytest.raises(MigrationError, match="Could not run '/no/such': No such file"):
        open_outgoing({"transport": "exec", "args": ["/no/such"]}, handed, NEVER)
    with pytest.raises(MigrationError, match="Argument list too long"):
        open_outgoing({"transport": "exec", "args": ["/bin/true", "x" * (1 << 20)]}, handed, NEVER)


def test_a_descriptor_that_was_handed_over_stays_as_it_was(handed: PassedFds) -> None:
    reader, writer = os.pipe()
    handed.add("pipe", os.dup(writer))
    made = open_outgoing({"transport": "socket", "type": "fd", "str": "pipe"}, handed, NEVER)
    made.write(b"state")
    made.finish()
    assert os.get_blocking(writer)
    assert os.read(reader, 10) == b"state"
    os.close(reader)
    os.close(writer)


def test_files(handed: PassedFds, tmp_path: Path) -> None:
    path = tmp_path / "state"
    made = open_outgoing(addresses.parse_uri(f"file:{path},offset=0x10"), handed, NEVER)
    made.write(b"state")
    assert made.tell() == 21
    made.finish()
    assert path.read_bytes() == bytes(16) + b"state"
    made = open_incoming(addresses.parse_uri(f"file:{path},offset=16"), handed)
    assert (made.read(3), made.read(10), made.read(10)) == (b"sta", b"te", b"")
    made.close()


def test_a_folder_and_a_fifo(handed: PassedFds, tmp_path: Path) -> None:
    made = open_incoming(addresses.parse_uri(f"file:{tmp_path}"), handed)
    with pytest.raises(MigrationError, match="Unable to read from file: Is a directory"):
        made.read(1)
    made.close()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(MigrationError, match=f"Could not create '{fifo}'"):
        open_outgoing(addresses.parse_uri(f"file:{fifo}"), handed, NEVER)
    keep = os.open(fifo, os.O_RDWR)
    os.write(keep, b"state")
    with pytest.raises(MigrationError, match="Could not go to offset 0x1 of"):
        open_incoming(addresses.parse_uri(f"file:{fifo},offset=1"), handed)
    made = open_incoming(addresses.parse_uri(f"file:{fifo}"), handed)
    assert made.read(10) == b"state"
    made.close()
    os.close(keep)


def test_a_peer_that_resets_the_connection() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    peer = server.accept()[0]
    made = Channel(client.detach(), "socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    with pytest.raises(MigrationError, match="Unable to read from socket: Connection reset"):
        made.read(1)
    made.close()
    server.close()


# Addresses that no system call takes.

FILE = {"transport": "file", "filename": "/tmp/x"}
BAD = {
    "offset 2^63": (FILE | {"offset": 1 << 63}, "file offset 0x8000000000000000 is in no file"),
    "offset 2^64-1": (FILE | {"offset": (1 << 64) - 1}, "is in no file"),
    "negative": (FILE | {"offset": -1}, "is in no file"),
    "offset text": (FILE | {"offset": "x"}, "Parameter 'offset' expects a number, not 'x'"),
    "NUL": ({"transport": "file", "filename": "a\0b"}, "Parameter 'filename' has a NUL in it"),
    "NUL, unix": (
        {"transport": "socket", "type": "unix", "path": "\0x"},
        "Parameter 'path' has a NUL",
    ),
    "long path": (
        {"transport": "socket", "type": "unix", "path": "x" * 108},
        "is too long\nPath must be less than 108 bytes",
    ),
    "no command": ({"transport": "exec", "args": []}, "Parameter 'args' expects a command"),
    "NUL, command": ({"transport": "exec", "args": ["a", "b\0"]}, r"'args\[1\]' has a NUL"),
    "number": ({"transport": "exec", "args": [1]}, "Invalid parameter type for 'args"),
    "no list": ({"transport": "exec", "args": "true"}, "'args', expected: array"),
    "args missing": ({"transport": "exec"}, "Parameter 'args' is missing"),
    "type": ({"transport": "socket", "type": ["unix"]}, "'type', expected: string"),
    "no object": ("file:x", "'addr', expected: object"),
    "port": (
        {"transport": "socket", "type": "inet", "host": "h", "port": 1},
        "Invalid parameter type for 'port', expected: string",
    ),
}


@pytest.mark.parametrize(("address", "text"), BAD.values(), ids=BAD)
def test_an_address_that_no_call_takes_is_refused(address: Any, text: str) -> None:
    with pytest.raises(MigrationError, match=text):
        addresses.check(address)
    with pytest.raises(MigrationError, match=text):
        addresses.parse(None, [{"channel-type": "main", "addr": address}])
    with pytest.raises(MigrationError, match=text):
        addresses.cpr_address([{"channel-type": "cpr", "addr": address}])


@pytest.mark.parametrize(
    "uri",
    ["file:x,offset=99999999999999999999", "file:x,offset=-1", "file:a\0b", "unix:" + "x" * 200]
    + ["exec:a\0b", "fd:\0", "tcp:\0:1", "file:x,offset=8e"],
)
def test_a_uri_that_no_call_takes_is_refused(uri: str) -> None:
    with pytest.raises(MigrationError):
        addresses.parse(uri, None)


@pytest.mark.parametrize("channels", [[{}], [{"channel-type": "main"}], ["x"], [[]]])
def test_channels_without_an_address(channels: Any) -> None:
    with pytest.raises(MigrationError, match="Parameter 'addr' is missing"):
        addresses.parse(None, channels)


@pytest.mark.parametrize("port", ["99999", "-1", "http", "1" * 30])
def test_ports_that_there_are_not(handed: PassedFds, port: str) -> None:
    address = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": port}
    with pytest.raises(MigrationError, match="Failed to connect to"):
        open_outgoing(address, handed, NEVER)
    with pytest.raises(MigrationError, match="Failed to bind socket to"):
        Listener(address)


def test_a_host_name_that_is_none(handed: PassedFds) -> None:
    address = {"transport": "socket", "type": "inet", "host": "x" * 300, "port": "1"}
    with pytest.raises(MigrationError, match="Failed to connect to"):
        open_outgoing(address, handed, NEVER)


# Listening.


def unix(path: Path) -> dict:
    return {"transport": "socket", "type": "unix", "path": str(path)}


def test_a_listening_path_is_ours_alone_and_goes_with_the_source(tmp_path: Path) -> None:
    path = tmp_path / "in"
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(str(path))
    left_over.close()
    listener = Listener(unix(path))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    made = listener.accept()
    assert not path.exists()
    client.send(b"state")
    assert made.read(10) == b"state"
    made.close()
    client.close()
    listener.close()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    with pytest.raises(MigrationError, match=f"Failed to bind socket to {path}: Address already"):
        Listener(unix(path))
    assert path.read_text() == "precious"


def test_a_source_that_does_not_come(tmp_path: Path) -> None:
    listener = Listener(unix(tmp_path / "in"))
    thread, raised = in_thread(listener.accept)
    thread.join(0.1)
    assert thread.is_alive()
    listener.shutdown()
    thread.join(DEADLINE_S)
    assert isinstance(raised[0], MigrationError)
    assert not (tmp_path / "in").exists()


def test_a_path_that_is_another_vmms_by_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "in"
    first = Listener(unix(path))
    second = Listener(unix(path))
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_a_descriptor_that_is_none_to_be_used_leaves_nothing_open() -> None:
    """O_PATH, say; again and again."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(MigrationError, match="Could not use the file: Bad file descriptor"):
            Channel(os.open("/", os.O_PATH), "file")
    assert len(os.listdir("/proc/self/fd")) == before
