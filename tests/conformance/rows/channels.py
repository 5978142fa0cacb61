"""Part 4: the channels that an update's state can go through, out and in."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from ..incoming_steps import take_over
from ..lab import Lab
from ..match import Mismatch, expect
from ..peer import (
    Pump,
    connection_to,
    fd_file,
    free_port,
    from_file,
    listen_tcp,
    listen_unix,
    to_file,
)
from ..row import Row, Steps, step
from ..steps import (
    DEFER,
    EXEC,
    FILE,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    events,
    migration,
    new_command,
    qmp,
    running,
    survives,
    talk,
    until,
)
from .migrate import BROKEN_SETUP

IN_BACKGROUND = ("setup", "{}", "STOP", "active", "pass:2", "device", "completed", "EOF")
WORKS = "4: file:F,offset=4096, relative file:, exec:, unix: with listener, channels file"


def main(**address: Any) -> list[dict[str, Any]]:
    return [{"channel-type": "main", "addr": address}]


FILE_ADDRESS = {"transport": "file", "filename": "$dir/state", "offset": 0}
UNIX = {"transport": "socket", "type": "unix", "path": "$dir/main.sock"}
INET = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "$port"}
FD = {"transport": "socket", "type": "fd", "str": "channel"}
HEAD = b"HEAD"


def listening(**address: Any) -> dict[str, Any]:
    """query-migrate of a VMM that waits for a connection."""
    return {"status": "setup", "socket-address": [address]}


LISTENING_UNIX = listening(type="unix", path="$dir/main.sock")
LISTENING_TCP = listening(type="inet", host="127.0.0.1", port="$port", ipv4=True)


@step
def write_head(lab: Lab) -> None:
    """$dir/state is there already, longer than a stream."""
    lab.path("$dir/state").write_bytes(HEAD + bytes(1 << 20))


@step
def head_is_kept(lab: Lab) -> None:
    expect("start of the file", HEAD, lab.path("$dir/state").read_bytes()[:4], lab.names)


@step
def relative_name(lab: Lab) -> None:
    """$relative is the name of the folder from where the VMM is."""
    cwd = lab.vm.process.cwd().removeprefix(lab.target.root) or "/"
    lab.names["relative"] = os.path.relpath(lab.names["dir"], cwd)


@step
def listen(lab: Lab, kind: str) -> None:
    """Takes a stream on $dir/main.sock, or on the port $port, into $dir/state."""
    if kind == "unix":
        listener = listen_unix(lab.path("$dir/main.sock"))
    else:
        listener, lab.names["port"] = listen_tcp()
    lab.pumps[kind] = Pump(connection_to(listener), to_file(lab.path("$dir/state")))


@step
def received(lab: Lab, kind: str) -> None:
    """The whole stream has come."""
    lab.pumps[kind].wait()


@step
def choose_port(lab: Lab) -> None:
    """$port is free."""
    lab.names["port"] = free_port()


@step
def deliver(lab: Lab, kind: str) -> None:
    """Connects to where the VMM listens, and sends it $dir/state."""
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    address: Any = str(lab.path("$dir/main.sock"))
    if kind == "tcp":
        address = ("127.0.0.1", int(lab.names["port"]))
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        if not until(lambda: connection.connect_ex(address) == 0):
            raise Mismatch(f"{lab.vm.name} does not listen on {address}")
        connection.sendall(lab.path("$dir/state").read_bytes())


@step
def pass_file(lab: Lab, flags: int, command: str, arguments: Any, returns: Any) -> None:
    """Passes a descriptor for $dir/state to the VMM."""
    fd = os.open(lab.path("$dir/state"), flags | os.O_CREAT, 0o600)
    _pass(lab, fd, command, arguments, returns)


@step
def pass_pipe_to_read(lab: Lab) -> None:
    """Passes the write end of a pipe as `channel`; what comes out of it goes to $dir/state."""
    reading, writing = os.pipe()
    _pass(lab, writing, "getfd", {"fdname": "channel"}, {})
    lab.pumps["pipe"] = Pump(fd_file(reading, "rb"), to_file(lab.path("$dir/state")))


@step
def pass_broken_pipe(lab: Lab) -> None:
    """Passes the write end of a pipe that nobody reads as `channel`."""
    reading, writing = os.pipe()
    os.close(reading)
    _pass(lab, writing, "getfd", {"fdname": "channel"}, {})


@step
def pass_pipe_to_write(lab: Lab) -> None:
    """Passes the read end of a pipe as `channel`; $dir/state goes into it."""
    reading, writing = os.pipe()
    _pass(lab, reading, "getfd", {"fdname": "channel"}, {})
    lab.pumps["pipe"] = Pump(from_file(lab.path("$dir/state")), fd_file(writing, "wb"))


def _pass(lab: Lab, fd: int, command: str, arguments: Any, returns: Any) -> None:
    """Passes `fd` to the VMM, and closes it here."""
    reply = lab.vm.qmp.execute(command, arguments, (fd,))
    os.close(fd)
    expect(f"reply to {command}", {"return": returns}, reply, lab.names)


NO_FILE = "fd: migration to a file is not supported. Use file: instead."
GETFD: tuple[str, Any, Any] = ("getfd", {"fdname": "channel"}, {})
ADD_FD = ("add-fd", {"fdset-id": 1}, {"fdset-id": 1, "fd": int})


def out(
    id: str,
    arguments: Any,
    *before: Steps,
    messages: tuple[str, ...] = EXEC,
    after: Steps = (),
    incoming: str = FILE,
    source: str = WORKS,
) -> Row:
    """An update through a channel; the new image loads what came out of it."""
    return Row(
        f"out-{id}",
        source,
        boot(),
        counting(),
        before,
        capabilities("events"),
        new_command(DEFER),
        talk("migrate", arguments, *messages),
        connect(),
        comes_to("inmigrate"),
        after,
        qmp("migrate-incoming", {"uri": incoming}, {}),
        survives(),
    )


def into(id: str, arguments: Any, *before: Steps, after: Steps = ()) -> Row:
    """A state that a VMM with -incoming defer is told to take from a channel.

    `after` are the steps that make something come through it.
    """
    return Row(
        f"in-{id}",
        WORKS,
        take_over(more=DEFER),
        connect(),
        before,
        capabilities("events"),
        talk("migrate-incoming", arguments, "setup", "{}"),
        after,
        events("active", "RESUME", "completed"),
        survives(),
    )


def option(id: str, uri: str, *before: Steps, after: Steps = ()) -> Row:
    """A state that comes through the channel that -incoming names."""
    return Row(
        f"incoming-{id}",
        WORKS,
        before,
        take_over(more=f"-incoming {uri}"),
        after,
        connect(),
        survives(),
    )


ROWS = [
    out("file-offset", {"uri": f"{FILE},offset=4096"}, incoming=f"{FILE},offset=4096"),
    out("file-offset-hex", {"uri": f"{FILE},offset=0x1000"}, incoming=f"{FILE},offset=4K"),
    out(
        "file-offset-keeps-what-is-before",
        {"uri": f"{FILE},offset=4"},
        write_head(),
        after=[head_is_kept()],
        incoming=f"{FILE},offset=4",
    ),
    out("file-longer-before", {"uri": FILE}, write_head()),
    out("file-relative", {"uri": "file:$relative/state"}, relative_name()),
    out("exec", {"uri": "exec:cat > $dir/state"}),
    out(
        "unix",
        {"uri": "unix:$dir/main.sock"},
        listen("unix"),
        messages=IN_BACKGROUND,
        after=[received("unix")],
    ),
    out(
        "tcp",
        {"uri": "tcp:127.0.0.1:$port"},
        listen("tcp"),
        messages=IN_BACKGROUND,
        after=[received("tcp")],
    ),
    out(
        "getfd-pipe",
        {"uri": "fd:channel"},
        pass_pipe_to_read(),
        after=[received("pipe")],
    ),
    Row(
        "out-getfd-file",
        "4: fd:nope",
        boot(),
        counting(),
        pass_file(os.O_WRONLY, *GETFD),
        capabilities("events"),
        new_command(),
        talk("migrate", {"uri": "fd:channel"}, "setup", "failing", "failed", f"error: {NO_FILE}"),
        running(),
    ),
    Row(
        "out-getfd-broken-pipe",
        "4: exec:false",
        boot(),
        counting(),
        pass_broken_pipe(),
        capabilities("events"),
        new_command(),
        talk("migrate", {"uri": "fd:channel"}, "setup", "STOP", "{}", "active"),
        events("failing", "RESUME", "failed"),
        migration({"status": "failed", "error-desc": BROKEN_SETUP}),
        running(),
    ),
    out("add-fd", {"uri": "file:/dev/fdset/1"}, pass_file(os.O_WRONLY, *ADD_FD)),
    out("channels-file", {"channels": main(**FILE_ADDRESS)}),
    out(
        "channels-exec",
        {"channels": main(transport="exec", args=["/bin/sh", "-c", "cat > $dir/state"])},
    ),
    out(
        "channels-unix",
        {"channels": main(**UNIX)},
        listen("unix"),
        messages=IN_BACKGROUND,
        after=[received("unix")],
    ),
    out(
        "channels-inet",
        {"channels": main(**INET)},
        listen("tcp"),
        messages=IN_BACKGROUND,
        after=[received("tcp")],
    ),
    out(
        "channels-fd",
        {"channels": main(**FD)},
        pass_pipe_to_read(),
        after=[received("pipe")],
    ),
    out(
        "channels-extra-cpr",
        {"channels": [*main(**FILE_ADDRESS), {"channel-type": "cpr", "addr": UNIX}]},
        source="4: extra 'cpr' channel in cpr-exec",
    ),
    into("file", {"uri": FILE}),
    into("exec", {"uri": "exec:cat $dir/state"}),
    into("getfd-pipe", {"uri": "fd:channel"}, pass_pipe_to_write()),
    into("add-fd", {"uri": "file:/dev/fdset/1"}, pass_file(os.O_RDONLY, *ADD_FD)),
    into(
        "unix",
        {"uri": "unix:$dir/main.sock"},
        after=[migration(LISTENING_UNIX), deliver("unix")],
    ),
    into(
        "tcp",
        {"uri": "tcp:127.0.0.1:$port"},
        choose_port(),
        after=[migration(LISTENING_TCP), deliver("tcp")],
    ),
    into("channels-file", {"channels": main(**FILE_ADDRESS)}),
    into("channels-exec", {"channels": main(transport="exec", args=["/bin/cat", "$dir/state"])}),
    into("channels-unix", {"channels": main(**UNIX)}, after=[deliver("unix")]),
    into("channels-inet", {"channels": main(**INET)}, choose_port(), after=[deliver("tcp")]),
    into("channels-fd", {"channels": main(**FD)}, pass_pipe_to_write()),
    option("exec", "'exec:cat $dir/state'"),
    option("unix", "unix:$dir/main.sock", after=[deliver("unix")]),
    option("tcp", "tcp:127.0.0.1:$port", choose_port(), after=[deliver("tcp")]),
    option("json", f"'{json.dumps(main(**FILE_ADDRESS)[0])}'"),
    option(
        "keyval",
        "channel-type=main,addr.transport=file,addr.filename=$dir/state,addr.offset=0",
    ),
]
