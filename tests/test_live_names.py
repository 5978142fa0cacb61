"""Names, memory and what cannot be preserved, in one process."""

from __future__ import annotations

import array
import contextlib
import io
import json
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpr import live
from cpr.live import testing


@pytest.fixture
def process() -> Iterator[testing.Process]:
    with testing.fake() as found:
        yield found


def restart(process: testing.Process) -> None:
    live.ready()
    assert process.run(live.update, ["new"], allow=["thread"])
    process.restart()


def test_socket_calls_make_only_the_first_time(process: testing.Process) -> None:
    sock = live.socket("web", lambda: socket.create_server(("127.0.0.1", 0)))
    address = sock.getsockname()
    restart(process)
    again = live.socket("web", lambda: pytest.fail("made again"))
    assert again.getsockname() == address and again.gettimeout() is None
    sock.close()
    again.close()


def test_a_nonblocking_socket_stays_one(process: testing.Process) -> None:
    first, second = socket.socketpair()
    first.setblocking(False)
    live.keep("pair", first)
    restart(process)
    assert live.get("pair").gettimeout() == 0
    for each in (first, second, live.get("pair")):
        each.close()


@pytest.mark.parametrize("mode", ["r+", "rb+", "w"])
def test_a_file_stands_at_the_same_place(
    process: testing.Process, tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "file"
    path.write_text("one\ntwo\nthree\n")
    file = live.file("file", lambda: open(path, mode))  # noqa: SIM115
    if mode == "w":
        file.write("begun ")
    else:
        file.readline()
    restart(process)
    again = live.file("file", lambda: pytest.fail("made again"))
    if mode == "w":
        again.write("ended")
        again.flush()
        assert path.read_text() == "begun ended"
    else:
        assert again.readline() in ("two\n", b"two\n")
    file.close()
    again.close()


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
def test_a_text_file_is_what_it_was(
    process: testing.Process, tmp_path: Path, newline: str | None
) -> None:
    def make() -> Any:
        return open(tmp_path / "log", "w", 1, "latin-1", "replace", newline)

    file = live.file("log", make)
    file.write("ü\n€\n")
    restart(process)
    again = live.file("log", make)
    for each in (file, again):
        assert (each.name, each.encoding, each.errors) == (file.name, "latin-1", "replace")
        assert each.line_buffering and not each.write_through
    again.write("end\n")
    end = (newline or "\n").encode()
    assert (tmp_path / "log").read_bytes() == b"\xfc" + end + b"?" + end + b"end" + end
    file.close()
    again.close()


@pytest.mark.parametrize("newline", [None, "", "\r"])
def test_lines_are_told_apart_as_before(
    process: testing.Process, tmp_path: Path, newline: str | None
) -> None:
    (tmp_path / "lines").write_bytes(b"a\rb\rc\r")
    file = live.file("lines", lambda: open(tmp_path / "lines", newline=newline))  # noqa: SIM115
    assert file.readline() == ("a\n" if newline is None else "a\r")
    restart(process)
    again = live.file("lines", lambda: pytest.fail("made again"))
    assert again.readline() == ("b\n" if newline is None else "b\r")
    file.close()
    again.close()


def test_what_would_lose_bytes_is_refused(process: testing.Process) -> None:
    reader, writer = os.pipe()
    with open(reader) as lines, open(writer, "w") as out:
        with pytest.raises(live.PreserveError, match=r"'lines' is a pipe.*live\.fd"):
            live.file("lines", lambda: lines)
        with pytest.raises(live.PreserveError, match=r"'lines' is a pipe.*live\.fd"):
            live.keep("lines", lines.buffer)
        live.keep("raw", open(os.dup(reader), "rb", 0))  # noqa: SIM115
        live.keep("out", out)
    first, second = socket.socketpair()
    context = ssl.create_default_context()
    tls = context.wrap_socket(first, do_handshake_on_connect=False, server_hostname="a")
    with pytest.raises(live.PreserveError, match="'tls' is a TLS socket"):
        live.keep("tls", tls)
    assert live.names() == ["out", "raw"]
    live.get("raw").close()
    tls.close()
    second.close()


def test_an_eventfd_keeps_its_count(process: testing.Process) -> None:
    number = live.fd("count", lambda: os.eventfd(30))
    os.eventfd_write(number, 30)
    restart(process)
    again = live.fd("count", lambda: -1)
    os.eventfd_write(again, 30)
    assert os.eventfd_read(again) == 90
    os.close(number)
    os.close(again)


def test_names_come_and_go(process: testing.Process) -> None:
    first, second = socket.socketpair()
    for name in ("c:2", "c:1", "other"):
        live.keep(name, first)
    assert live.names() == ["c:1", "c:2", "other"] and live.names("c:") == ["c:1", "c:2"]
    live.drop("c:1")
    assert live.names("c:") == ["c:2"]
    restart(process)
    assert live.names() == ["c:2", "other"]
    first.close()
    second.close()


def test_memory_grows_only_where_asked_to(process: testing.Process) -> None:
    live.memory("table", 8192)[:3] = b"abc"
    restart(process)
    with pytest.raises(live.PreserveError, match=r"'table' has 8192 bytes.* 16384"):
        live.memory("table", 16384)
    restart(process)
    with pytest.raises(live.PreserveError, match=r"'table' has 8192 bytes.* 4096"):
        live.memory("table", 4096, grow=True)
    restart(process)
    memory = live.memory("table", 16384, grow=True)
    assert len(memory) == 16384 and memory[:3] == b"abc" and memory[-1] == 0


def test_memory_without_huge_pages_where_there_are_none(process: testing.Process) -> None:
    restart(process)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 << 20)
    size = pages // 4 * 3 * (2 << 20)  # so much is never free in huge pages
    with pytest.raises(live.PreserveError, match=r"'ü+'.* huge pages"):
        live.memory("ü" * 200, size, huge=True)
    assert len(live.memory("ü" * 200, 4096)) == 4096


def closed() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


BAD: list[tuple[str, Any]] = [
    ("'a' is closed", lambda: live.keep("a", closed())),
    ("'a' is closed", lambda: live.keep("a", 12345)),
    ("'a' is closed", lambda: live.socket("a", closed)),
    ("'a' is closed, or has no", lambda: live.keep("a", io.StringIO())),
    ("'a' is a list, which has no descriptor", lambda: live.keep("a", [])),
    ("'a': make\\(\\) returned a int, and no socket", lambda: live.socket("a", lambda: 0)),
    ("'' is no name", lambda: live.keep("", 0)),
    ("7 is no name", lambda: live.keep(7, 0)),
    ("'a\\\\nb' is no name", lambda: live.keep("a\nb", 0)),
    ("'a' is no preserved name", lambda: live.get("a")),
    ("'a' is no preserved name", lambda: live.drop("a")),
    ("'a': a memory of 0 bytes", lambda: live.memory("a", 0)),
    ("'a': a memory of -1 bytes", lambda: live.memory("a", -1)),
    ("'a': 1152921504606846976 bytes of memory", lambda: live.memory("a", 1 << 60)),
    ("'a': .*4097 bytes of memory|memfd_create", lambda: live.memory("a", 4097, huge=True)),
]


@pytest.mark.parametrize(("text", "call"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_preserved_is_named(process: testing.Process, text: str, call: Any) -> None:
    with pytest.raises(live.PreserveError, match=text):
        call()
    assert live.names() == []


def test_a_name_is_used_once(process: testing.Process) -> None:
    sock = live.socket("a", socket.socket)
    for call in (
        lambda: live.socket("a", socket.socket),
        lambda: live.keep("a", sock),
        lambda: live.memory("a", 4096),
    ):
        with pytest.raises(live.PreserveError, match="'a' is used twice"):
            call()
    assert live.get("a") is sock
    live.drop("a")
    live.keep("a", sock)
    sock.close()
    with pytest.raises(live.UpdateError, match="'a' cannot go over: it has been closed"):
        live.update(["new"], allow=["thread"])


def test_a_kind_is_not_taken_for_another(process: testing.Process) -> None:
    live.fd("a", lambda: os.eventfd(0))
    restart(process)
    with pytest.raises(live.PreserveError, match="'a' is a fd, and not a socket"):
        live.socket("a", socket.socket)


@pytest.mark.parametrize("value", [{1, 2}, object(), {"a": b"bytes"}, {("a", "b"): 1}])
def test_a_state_that_json_cannot_carry_is_named(process: testing.Process, value: Any) -> None:
    def save_it() -> Any:
        return value

    live.on_save(save_it)
    with pytest.raises(live.UpdateError, match=r"JSON cannot carry what .*save_it returned"):
        live.update(["new"], allow=["thread"])
    assert process.updates == 0


@pytest.mark.parametrize(
    "value", [b"", b"\xff" * 3000000, "", 0, None, [1.5, {"ü": [None]}], "x" * (20 << 20)]
)
def test_states_come_back_as_they_were(process: testing.Process, value: Any) -> None:
    live.on_save(lambda: value)
    restart(process)
    assert live.state(default="none") == ("none" if value is None else value)


@pytest.mark.parametrize(
    "value",
    [
        array.array("I", range(1000)),
        array.array("d"),
        memoryview(b"0123456789")[::-3],
        memoryview(bytes(range(24))).cast("B", (2, 3, 4)),
    ],
)
def test_a_view_goes_over_with_all_its_bytes(process: testing.Process, value: Any) -> None:
    view = memoryview(value)
    live.on_save(lambda: view)
    restart(process)
    assert live.state() == view.tobytes()


def test_a_function_that_fails_is_told(process: testing.Process) -> None:
    live.on_save(lambda: json.loads("{"))
    with pytest.raises(live.UpdateError, match=r"<lambda>, of on_save, .*JSONDecode") as caught:
        live.update(["new"], allow=["thread"])
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)

    @live.on_pause
    def end_threads() -> None:
        raise RuntimeError("no")

    with pytest.raises(live.UpdateError, match=r"end_threads, of on_pause, .*RuntimeError"):
        live.update(["new"], allow=["thread"])


def test_a_file_that_cannot_go_over_is_named(process: testing.Process, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\ntwo\n")
    with open(tmp_path / "lines") as lines:
        live.keep("lines", lines)
        for _ in lines:
            with pytest.raises(live.UpdateError, match="'lines' cannot go over: telling position"):
                live.update(["new"], allow=["thread"])
        live.drop("lines")
    full = open("/dev/full", "w")  # noqa: SIM115
    live.keep("full", full)
    full.write("x")
    with pytest.raises(live.UpdateError, match=r"'full' cannot go over: .*No space left"):
        live.update(["new"], allow=["thread"])
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("mode 'soon'", {"mode": "soon"}),
        ("guard 'none'", {"guard": "none"}),
        ("a timeout of 0", {"timeout": 0}),
        ("empty command", {"argv": []}),
    ],
)
def test_options_that_make_no_sense(
    process: testing.Process, text: str, options: dict[str, Any]
) -> None:
    with pytest.raises(live.UpdateError, match=text):
        live.update(options.pop("argv", ["new"]), **options)
