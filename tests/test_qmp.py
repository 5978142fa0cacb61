"""The QMP monitor: the texts are those of QEMU 11.1.3."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vmm import FakeVmm, ScriptedChardev
from hypothesis import given
from hypothesis import strategies as st

from cpr.chardev.base import create
from cpr.errors import CommandError
from cpr.monitor.control import MAX_UNREAD
from cpr.monitor.json_stream import MAX_SIZE, MAX_TOKENS, JsonStream
from cpr.monitor.qmp import TURN_NS, QmpMonitor

GREETING = {
    "QMP": {
        "version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "cpr-vmm 0.1.0"},
        "capabilities": ["oob"],
    }
}


class Client:
    def __init__(self, vmm: FakeVmm, pretty: bool = False) -> None:
        self.chardev = ScriptedChardev(vmm.loop)
        self.monitor = QmpMonitor(self.chardev, vmm, pretty)

    def send(self, text: str | bytes) -> list[dict]:
        """What comes back for `text`."""
        self.chardev.type(text.encode() if isinstance(text, str) else text)
        return self.read()

    def read(self) -> list[dict]:
        return [json.loads(line) for line in self.chardev.take_output().split(b"\r\n") if line]

    def execute(self, name: str, **arguments: Any) -> Any:
        """The return value or the error's text."""
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        (answer,) = self.send(json.dumps(request))
        return answer["error"]["desc"] if "error" in answer else answer["return"]


@pytest.fixture
def vmm() -> Iterator[FakeVmm]:
    vmm = FakeVmm()
    yield vmm
    vmm.close()


@pytest.fixture
def client(vmm: FakeVmm) -> Client:
    client = Client(vmm)
    assert client.read() == [GREETING]
    return client


@pytest.fixture
def ready(client: Client) -> Client:
    assert client.send('{"execute":"qmp_capabilities"}') == [{"return": {}}]
    return client


def error(text: str, error_class: str = "GenericError") -> dict:
    return {"error": {"class": error_class, "desc": text}}


# Negotiation.


def test_negotiation(client: Client) -> None:
    assert client.send('{"execute":"query-status"}') == [
        error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
    ]
    assert client.execute("qmp_capabilities", foo=1) == "Parameter 'foo' is unexpected"
    assert client.execute("qmp_capabilities", enable="x") == (
        "Invalid parameter type for 'enable', expected: array"
    )
    assert client.execute("qmp_capabilities", enable=[1]) == (
        "Invalid parameter type for 'enable[0]', expected: string"
    )
    assert client.execute("qmp_capabilities", enable=["oob"]) == {}
    assert client.send('{"execute":"qmp_capabilities"}') == [
        error("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
    ]


def test_out_of_band(client: Client) -> None:
    assert client.send('{"exec-oob":"query-status"}') == [
        error("QMP input member 'exec-oob' is unexpected")
    ]
    client.execute("qmp_capabilities", enable=["oob"])
    assert client.send('{"exec-oob":"query-status"}') == [
        error("The command query-status does not support OOB")
    ]
    assert client.send('{"exec-oob":"query-status","execute":"stop"}') == [
        error("QMP input member 'execute' clashes with 'exec-oob'")
    ]


def test_a_new_client_negotiates_anew(vmm: FakeVmm, ready: Client) -> None:
    ready.chardev.type(b'{"execute":')  # half a command of the client that leaves
    ready.chardev.reconnect()
    assert ready.read() == [GREETING]
    vmm.events.emit("STOP")
    assert ready.read() == []
    assert ready.execute("qmp_capabilities") == {}


# Requests.


@pytest.mark.parametrize(
    ("text", "description"),
    [
        ('{"foo":1}', "QMP input member 'foo' is unexpected"),
        ('{"execute":3}', "QMP input member 'execute' must be a string"),
        ('{"execute":"stop","arguments":3}', "QMP input member 'arguments' must be an object"),
        ('{"execute":"stop","bar":1}', "QMP input member 'bar' is unexpected"),
        ('{"execute":"stop","arguments":{"a":1}}', "Parameter 'a' is unexpected"),
        ("{}", "QMP input lacks member 'execute'"),
        ("[1]", "QMP input must be a JSON object"),
        ('"x"', "QMP input must be a JSON object"),
        ("null", "QMP input must be a JSON object"),
    ],
)
def test_requests_of_a_wrong_shape(ready: Client, text: str, description: str) -> None:
    assert ready.send(text + "\n") == [error(description)]
    assert ready.execute("query-status") == {"status": "prelaunch", "running": False}


def test_ids_come_back(ready: Client) -> None:
    for identity in (1, "x", None, {"a": [1, 2.5, None]}, ["é"]):
        request = {"execute": "query-status", "id": identity}
        (answer,) = ready.send(json.dumps(request))
        assert answer == {"return": {"status": "prelaunch", "running": False}, "id": identity}
    (answer,) = ready.send('{"execute":"query-foo","id":7}')
    assert answer == {
        "id": 7,
        **error("The command query-foo has not been found", "CommandNotFound"),
    }


def test_pipelined_commands_are_answered_in_order(vmm: FakeVmm, ready: Client) -> None:
    text = '{"execute":"stop","id":1}{"execute":"cont","id":2} \n {"execute":"stop","id":3}'
    answers = ready.send(text)
    assert [a["id"] for a in answers if "id" in a] == [1, 2, 3]
    assert vmm.machine.calls == ["stop", "cont", "stop"]
    assert [a["event"] for a in answers if "event" in a] == ["RESUME", "STOP"]


def test_a_command_in_pieces(ready: Client) -> None:
    text = '{"execute":"query-name","id":"é\\u20ac"}\n'.encode()
    for byte in text[:-1]:
        answers = ready.send(bytes([byte]))
    assert answers == [{"return": {"name": "guest"}, "id": "é€"}]


def test_events_have_a_timestamp(vmm: FakeVmm, ready: Client) -> None:
    vmm.events.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    (event,) = ready.read()
    assert event["event"] == "SHUTDOWN"
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert set(event["timestamp"]) == {"seconds", "microseconds"}


def test_close_ends_the_subscription(vmm: FakeVmm, ready: Client) -> None:
    ready.monitor.close()
    vmm.events.emit("STOP")
    assert ready.send('{"execute":"query-status"}') == []


def test_pretty(vmm: FakeVmm) -> None:
    client = Client(vmm, pretty=True)
    assert json.loads(client.chardev.output) == GREETING
    assert client.chardev.output.startswith(b'{\n    "QMP": {\n')


def test_a_bug_in_a_command_does_not_end_the_monitor(
    vmm: FakeVmm, ready: Client, capfd: pytest.CaptureFixture
) -> None:
    vmm.machine.stop = None  # type: ignore[method-assign, assignment]
    assert ready.execute("stop").startswith("internal error: ")
    assert "Traceback" in capfd.readouterr().err
    assert ready.execute("query-name") == {"name": "guest"}


# JSON.


@pytest.mark.parametrize(
    ("text", "descriptions"),
    [
        ("}", ["1:1: JSON parse error, expecting value"]),
        ('{"a":}', ["1:6: JSON parse error, expecting value"]),
        ('{"a" 1}', ["1:6: JSON parse error, expecting ':'"]),
        ('{"a":1 "b":2}', ["1:8: JSON parse error, expected ',' or '}'"]),
        ('{"a":1,}', ["1:8: JSON parse error, expecting key"]),
        ("{1:2}", ["1:2: JSON parse error, expecting key"]),
        ("[1 2]", ["1:4: JSON parse error, expected ',' or ']'"]),
        ("[1,]", ["1:4: JSON parse error, expecting value"]),
        ('{"a":tru}', ["1:6: JSON parse error, invalid keyword 'tru'"]),
        ('{"a":1,"a":"y"}', ["1:12: JSON parse error, duplicate key"]),
        ('{"execute":"query-status" foo}', ["1:27: JSON parse error, expected ',' or '}'"]),
        ("\x01", ["1:1: JSON parse error, stray '\x01'"]),
        ("-x", ["1:1: JSON parse error, stray '-x'"]),
        ('"abc', ["1:1: JSON parse error, stray '\"abc\n'"]),
        ('{"a":"\\x"}', ["1:6: JSON parse error, invalid escape sequence in string"]),
        (
            '{"a":"\\ud800"}',
            ["1:6: JSON parse error, \\ud800 is not a valid Unicode character"],
        ),
        (
            '{"id":01}',
            [
                "1:7: JSON parse error, stray '01'",
                "1:10: JSON parse error, expecting value",
            ],
        ),
        ('{"a"\n\n:,}', ["3:2: JSON parse error, expecting value"]),
    ],
)
def test_broken_json(ready: Client, text: str, descriptions: list[str]) -> None:
    ready.chardev.reconnect()
    ready.read()
    assert ready.send(text + "\n") == [error(description) for description in descriptions]
    assert ready.execute("qmp_capabilities") == {}


def test_bytes_that_are_no_utf8(ready: Client) -> None:
    (answer,) = ready.send(b'{"id":"\xc2"}\n')
    assert answer == error("1:37: JSON parse error, invalid UTF-8 sequence in string")
    answers = ready.send(b"\xff\n")
    assert answers == [error("2:1: JSON parse error, stray '�'")]


def test_limits(ready: Client) -> None:
    assert ready.send("[" * 513) == [error("JSON nesting depth limit exceeded")]
    assert ready.send("]" * 513) == []
    deepest = "[" * 511 + "]" * 511
    (answer,) = ready.send(f'{{"execute":"query-name","id":{deepest}}}')
    assert answer == {"return": {"name": "guest"}, "id": json.loads(deepest)}
    (answer,) = ready.send(f'{{"execute":"query-name","id":{"1" * 50}}}')
    assert answer["id"] == float("1" * 50)
    for number in ("1e999", "-1e999", "1" * 5000):
        (answer,) = ready.send(f'{{"execute":"query-name","id":{number}}}')
        assert answer["error"]["desc"].endswith(f"number {number} is too large")
    stream = JsonStream()
    size = MAX_SIZE + 1
    results = stream.feed(b'{"id":"') + stream.feed(b"x" * size) + stream.feed(b'"}')
    assert str(results[0]) == "JSON token size limit exceeded"
    assert str(JsonStream().feed(b"1" * (65 << 10))[0]) == "JSON token size limit exceeded"
    results = JsonStream().feed(b"[" + b"1," * (MAX_TOKENS // 2))
    assert [str(result) for result in results] == ["JSON token count limit exceeded"]


@pytest.mark.parametrize("body", [b'""', rb"\n", rb"\'", rb"\\", rb"\u00e4"])
def test_a_string_of_many_escapes(body: bytes) -> None:
    """Each would be looked at for itself otherwise, while all other clients wait."""
    count = (MAX_SIZE - 100) // len(body)
    (value,) = JsonStream().feed(b"['" + body * count + b"']")
    expected = {b'""': '""', rb"\n": "\n", rb"\'": "'", rb"\\": "\\", rb"\u00e4": "ä"}[body]
    assert value == [expected * count]


def test_what_is_no_text_is_none_in_an_answer(client: Client, vmm: FakeVmm) -> None:
    client.send('{"execute":"qmp_capabilities"}')
    vmm.events.emit("WATCHED", {"path": "a\udcff\\ud800 \U0001f600\ud83d\udcff", "next": "\udcff"})
    text = client.chardev.take_output().decode()
    assert json.loads(text)["data"] == {
        "path": "a\ufffd\\ud800 \U0001f600\U0001f4ff",
        "next": "\ufffd",
    }


def test_clients_have_their_turns(ready: Client, vmm: FakeVmm, monkeypatch) -> None:
    now = [0]
    monkeypatch.setattr(
        "cpr.monitor.qmp.time",
        SimpleNamespace(monotonic_ns=lambda: now.__setitem__(0, now[0] + TURN_NS + 1) or now[0]),
    )
    answers = ready.send('{"execute":"query-name"}' * 5)
    for count in range(1, 6):
        assert len(answers) == count
        vmm.loop.iterate(0)
        answers += ready.read()


@pytest.mark.parametrize(
    "start", [b'"', b"a", b"1", b"[ "], ids=["string", "word", "number", "blanks"]
)
def test_small_pieces_of_what_is_long(start: bytes) -> None:
    """A byte is looked at once, however small the pieces are: this would take minutes otherwise."""
    stream = JsonStream()
    piece = start[-1:].replace(b'"', b"x") * 8
    results = stream.feed(start)
    for _ in range(1 << 17):
        results += stream.feed(piece)
    results += stream.feed(b'"\n]\n{}')
    assert results[-1] == {}


def test_qemus_dialect() -> None:
    stream = JsonStream()
    text = b"""{'a':'b"c',"d":"\\u00e9\\ud83d\\ude00\\/\\'"} [true,false,null,-0,1.5e3,[]] {}"""
    assert stream.feed(text) == [
        {"a": 'b"c', "d": "é\N{GRINNING FACE}/'"},
        [True, False, None, 0, 1500.0, []],
        {},
    ]
    assert stream.feed(b"18446744073709551615 18446744073709551616 ") == [
        18446744073709551615,
        18446744073709551616.0,
    ]


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(st.characters(codec="utf-8", exclude_characters="\ufffe\uffff")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)


@given(JSON_VALUES, st.booleans())
def test_json_round_trip(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assume_valid = JsonStream().feed(text.encode() + b"\n")
    assert len(assume_valid) == 1
    if not isinstance(assume_valid[0], CommandError):  # noncharacters are refused, as by QEMU
        assert assume_valid[0] == value


@given(st.lists(st.binary(max_size=40)))
def test_pieces_do_not_matter(pieces: list[bytes]) -> None:
    """Any bytes at all: no exception, and the same results however they are cut."""

    def shown(results: list) -> list[str]:
        return [repr(result) for result in results]

    whole = b"".join(pieces)
    cut, uncut = JsonStream(), JsonStream()
    in_pieces = [result for piece in pieces for result in cut.feed(piece)]
    assert shown(in_pieces) == shown(uncut.feed(whole))
    end = b'\x01\n"\n' + b"]}" * 40 + b'\n{"a":1}\n'
    assert cut.feed(end)[-1] == {"a": 1}  # whatever came before, it is in step again


# Arguments.


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("memsave", {}, "Parameter 'val' is missing"),
        ("memsave", {"val": "x"}, "Parameter 'val' expects uint64"),
        (
            "memsave",
            {"val": 0, "size": 1, "filename": 1},
            "Invalid parameter type for 'filename', expected: string",
        ),
        (
            "memsave",
            {"val": 0, "size": 1, "filename": "/nonexistent/x"},
            "Could not open '/nonexistent/x': No such file or directory",
        ),
        (
            "memsave",
            {"val": 0, "size": 1, "filename": "x", "cpu-index": 5},
            "Parameter 'cpu-index' expects a CPU number",
        ),
        (
            "memsave",
            {"val": 0, "size": 1, "filename": "x", "cpu-index": 1 << 63},
            "Invalid parameter type for 'cpu-index', expected: integer",
        ),
        ("migrate", {"foo": 1}, "Parameter 'foo' is unexpected"),
        ("migrate", {"detach": True}, "Parameter 'detach' is unexpected"),
        ("migrate", {"resume": 3}, "Invalid parameter type for 'resume', expected: boolean"),
        ("migrate", {"channels": 3}, "Invalid parameter type for 'channels', expected: array"),
        (
            "migrate",
            {"channels": [3]},
            "Invalid parameter type for 'channels[0]', expected: object",
        ),
        ("migrate", {"channels": [{}]}, "Parameter 'channels[0].channel-type' is missing"),
        (
            "migrate",
            {"channels": [{"channel-type": "foo"}]},
            "Parameter 'channel-type' does not accept value 'foo'",
        ),
        (
            "migrate",
            {"channels": [{"channel-type": "main", "addr": {}}]},
            "Parameter 'channels[0].addr.transport' is missing",
        ),
        (
            "migrate",
            {"channels": [{"channel-type": "main", "addr": {"transport": "foo"}}]},
            "Parameter 'transport' does not accept value 'foo'",
        ),
        (
            "migrate",
            {"channels": [{"channel-type": "main", "addr": {"transport": "socket"}}]},
            "Parameter 'channels[0].addr.type' is missing",
        ),
        (
            "migrate",
            {
                "channels": [
                    {
                        "channel-type": "main",
                        "addr": {"transport": "socket", "type": "unix", "path": 1},
                    }
                ]
            },
            "Invalid parameter type for 'channels[0].addr.path', expected: string",
        ),
        (
            "migrate",
            {
                "channels": [
                    {"channel-type": "main", "addr": {"transport": "exec", "args": ["a", 1]}}
                ]
            },
            "Invalid parameter type for 'channels[0].addr.args[1]', expected: string",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "events"}]},
            "Parameter 'capabilities[0].state' is missing",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "bogus", "state": True}]},
            "Parameter 'capability' does not accept value 'bogus'",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "events", "state": 1, "x": 1}]},
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        ("migrate-continue", {"state": "foo"}, "Parameter 'state' does not accept value 'foo'"),
        (
            "migrate-continue",
            {"state": "active"},
            "Migration not in expected state: none",
        ),
        ("human-monitor-command", {}, "Parameter 'command-line' is missing"),
        (
            "human-monitor-command",
            {"command-line": "info status", "cpu-index": 9},
            "Parameter 'cpu-index' expects a CPU number",
        ),
        (
            "remove-fd",
            {"fdset-id": "x"},
            "Invalid parameter type for 'fdset-id', expected: integer",
        ),
    ],
)
def test_arguments(ready: Client, name: str, arguments: dict, text: str) -> None:
    (answer,) = ready.send(json.dumps({"execute": name, "arguments": arguments}))
    assert answer == error(text)


def test_channels_arrive_as_they_were_sent(vmm: FakeVmm, ready: Client) -> None:
    channels = [
        {
            "channel-type": "main",
            "addr": {"transport": "file", "filename": "/x", "offset": 4096},
        },
        {
            "channel-type": "cpr",
            "addr": {"transport": "socket", "type": "inet", "host": "h", "port": "1"},
        },
    ]
    assert ready.execute("migrate", channels=channels) == {}
    assert vmm.migration.calls == [("migrate", None, channels, False)]


# Descriptors.


def test_passed_descriptors(vmm: FakeVmm, ready: Client) -> None:
    def hand_over() -> int:
        fd = os.open(os.devnull, os.O_RDONLY)
        ready.chardev.fds.append(fd)
        return fd

    assert ready.execute("getfd", fdname="a") == "No file descriptor supplied via SCM_RIGHTS"
    first = hand_over()
    assert ready.execute("getfd", fdname="a") == {}
    second = hand_over()
    assert ready.execute("getfd", fdname="a") == {}
    with pytest.raises(OSError):
        os.fstat(first)  # the name went to the second
    hand_over()
    assert ready.execute("getfd", fdname="1a") == (
        "Parameter 'fdname' expects a name not starting with a digit"
    )
    assert vmm.passed_fds.take("a") == second
    os.close(second)
    assert ready.execute("closefd", fdname="a") == "File descriptor named 'a' not found"
    fd = hand_over()
    assert ready.execute("add-fd", fdset_id=7, opaque="x") == {"fdset-id": 7, "fd": fd}
    other = hand_over()
    assert ready.execute("add-fd") == {"fdset-id": 0, "fd": other}
    hand_over()
    assert ready.execute("add-fd", fdset_id=-1) == (
        "Parameter 'fdset-id' expects a non-negative value"
    )
    assert ready.execute("query-fdsets") == [
        {"fdset-id": 0, "fds": [{"fd": other}]},
        {"fdset-id": 7, "fds": [{"fd": fd, "opaque": "x"}]},
    ]
    assert ready.execute("remove-fd", fdset_id=7, fd=999) == (
        "File descriptor named 'fdset-id:7, fd:999' not found"
    )
    assert ready.execute("remove-fd", fdset_id=7) == {}
    assert ready.execute("remove-fd", fdset_id=7) == "File descriptor named 'fdset-id:7' not found"


# A client that QEMU's project made.


def test_with_qemus_own_client(vmm: FakeVmm, tmp_path: Path) -> None:
    qmp = pytest.importorskip("qemu.qmp")
    path = str(tmp_path / "qmp.sock")

    class Config:
        id, backend = "qmp0", "socket"
        options = {"path": path, "server": True, "wait": False}

    chardev = create(Config, vmm.loop)
    monitor = QmpMonitor(chardev, vmm)
    thread = threading.Thread(target=vmm.loop.run)
    thread.start()

    async def talk() -> tuple:
        client = qmp.QMPClient("test")
        await client.connect(path)
        with client.listener("RESUME") as listener:
            status = await client.execute("query-status")
            await client.execute("cont")
            event = await listener.get()
        with pytest.raises(qmp.ExecuteError, match="has not been found"):
            await client.execute("query-foo")
        await client.disconnect()
        return status, event["event"], client.greeting.QMP.version["qemu"]["major"]

    try:
        assert asyncio.run(talk()) == (
            {"status": "prelaunch", "running": False},
            "RESUME",
            11,
        )
    finally:
        vmm.loop.stop()
        thread.join()
        monitor.close()
        chardev.close()


# A client that does not read.


def test_commands_of_a_client_that_reads_no_answer_wait(vmm: FakeVmm, ready: Client) -> None:
    chardev = ready.chardev
    chardev.stalled = True
    chardev.type(b'{"execute":"query-commands"}' * 1000)
    largest = 64 << 10  # of one answer
    for _ in range(20):  # its turns
        vmm.loop.iterate(0)
    assert MAX_UNREAD < len(chardev.output) < MAX_UNREAD + largest
    assert chardev.typed, "what it sent on was read"
    answers = len(ready.read())
    while answers < 1000:
        chardev.writable()
        vmm.loop.iterate(0)
        got = len(ready.read())
        assert got
        answers += got
    assert answers == 1000


def test_a_client_that_comes_after_one_that_did_not_read(vmm: FakeVmm, ready: Client) -> None:
    ready.chardev.stalled = True
    ready.chardev.type(b'{"execute":"query-commands"}' * 100)
    ready.chardev.typed = b""
    ready.chardev.take_output()
    ready.chardev.reconnect()
    ready.chardev.writable()
    assert ready.read() == [GREETING]


def test_commands_that_come_in_a_hand_over_wait(vmm: FakeVmm, ready: Client) -> None:
    ready.monitor.hold(True)
    ready.chardev.type(b'{"execute": "query-name"}')
    assert ready.chardev.take_output() == b""
    ready.monitor.hold(False)
    vmm.loop.iterate(0)
    assert b'"guest"' in ready.chardev.take_output()
