"""Part 5: cpr-transfer, from one process to another, and with the suite as either of them."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

from ..capture import memfd
from ..cpr_state import decode, encode
from ..incoming_steps import take_over
from ..lab import Lab
from ..match import Mismatch, expect, has, like, matches
from ..peer import Pump, connection_to, is_listening, listen_unix, to_file
from ..process import DEADLINE
from ..row import Row, Steps, step
from ..steps import (
    DEFER,
    FILE,
    INCOMING,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    events,
    exits,
    forget_events,
    guest,
    hmp,
    killed,
    migration,
    on,
    parameters,
    qmp,
    refused,
    running,
    start,
    status,
    stderr,
    still,
    survives,
    talk,
    until,
    update,
)
from .channels import UNIX, deliver
from .migrate import POSTMIGRATE, PRIVATE, incompatible
from .stream import stream_is_well_formed

ABORTED = -signal.SIGABRT
STREAMABLE = "Migration requires streamable transport (eg unix)"
BAD_ADDRESS = "bad cpr channel address; must be unix"
BAD_SOCKET = "bad cpr channel socket type; must be unix"
NOBODY = "Failed to connect to '$dir/cpr.sock': No such file or directory"
NOT_COMPATIBLE = (
    r"Memory region {} is not compatible with CPR\. share=on is required for memory-backend "
    r"objects, and aux-ram-share=on is required\."
)
CPR_SOCKET = {"transport": "socket", "type": "unix", "path": "$dir/cpr.sock"}
MAIN_FILE = {"transport": "file", "filename": "$dir/state", "offset": 0}
INET = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"}
BLANK = b" "
SENT = ("STOP", "active", "pass:2", "device", "completed")


def channels(main: Any = UNIX, cpr: Any = CPR_SOCKET) -> dict[str, Any]:
    return {
        "channels": [
            {"channel-type": "main", "addr": main},
            {"channel-type": "cpr", "addr": cpr},
        ]
    }


MAIN_OPTION = f"-incoming '{json.dumps({'channel-type': 'main', 'addr': UNIX})}'"
CPR_OPTION = f"-incoming '{json.dumps({'channel-type': 'cpr', 'addr': CPR_SOCKET})}'"
CPR_KEYVAL = "-incoming cpr,addr.transport=socket,addr.type=unix,addr.path=$dir/cpr.sock"
BOTH = f"{MAIN_OPTION} {CPR_OPTION}"
RAM_KEYS = ("total", "page-size", "transferred", "normal", "duplicate", "remaining")
COMPLETED = {
    "status": "completed",
    "setup-time": int,
    "downtime": int,
    "total-time": int,
    "ram": has(dict.fromkeys(RAM_KEYS, int)),
}


def source(options: str = guest()) -> Steps:
    """A counting guest that is about to be transferred."""
    return [
        boot(options, "src"),
        counting(),
        capabilities("events"),
        parameters(mode="cpr-transfer"),
    ]


@step
def waits_without_monitor(lab: Lab) -> None:
    """The destination waits for the CPR state, and has no monitor yet."""
    if not until(lambda: is_listening(lab.fill("$dir/cpr.sock"))):
        raise Mismatch("nobody listens on the cpr channel")
    expect("QMP socket", False, lab.path("$dir/dst.sock").exists(), lab.names)


def destination(options: str) -> Steps:
    return [start(guest(options), "dst"), waits_without_monitor()]


@step
def same_ram(lab: Lab) -> None:
    """The destination's memfds are the source's."""
    expect("memfds", _memfds(lab, "src"), _memfds(lab, "dst"), lab.names)


def _memfds(lab: Lab, name: str) -> list[tuple[str, int]]:
    each = lab.vms[name].process.descriptors().values()
    return sorted((d.target, d.inode) for d in each if d.target.startswith("/memfd:"))


@step
def went_on_from(lab: Lab, name: str) -> None:
    """The guest's counter is not less than the other VMM's."""
    lab.vm.count = lab.vms[name].count


@step
def blocked_by(lab: Lab, *names: str) -> None:
    """query-migrate has these regions among the reasons."""
    reasons = lab.vm.query("query-migrate")["blocked-reasons"]
    for name in names:
        wanted = like(NOT_COMPATIBLE.format(name))
        if not any(matches(wanted, reason, lab.names) for reason in reasons):
            raise Mismatch(f"{name} is not among {reasons}")


def transferred() -> Steps:
    """Both sides afterwards."""
    return [
        on("src", comes_to("postmigrate"), migration(COMPLETED)),
        hmp("info status", "VM status: paused (postmigrate)"),
        on("dst", comes_to("running"), migration({"status": "completed"}), went_on_from("src")),
        counting(),
    ]


def refusal(id: str, arguments: Any, text: Any, options: str = guest()) -> Row:
    """`migrate` is refused before an event; the guest never stops."""
    return Row(
        f"transfer-{id}",
        "5: refusals",
        source(options),
        refused("migrate", arguments, text),
        running(),
    )


def set_up(id: str, arguments: Any, text: str, source_line: str = "5: refusals") -> Row:
    """The cpr channel cannot be opened; the guest never stops."""
    return Row(
        f"transfer-{id}",
        source_line,
        source(),
        talk("migrate", arguments, "setup", "failing", "failed", f"error: {text}"),
        migration({"status": "failed", "error-desc": text}),
        running(),
    )


def no_cpr_channel(id: str, uri: str) -> Row:
    return Row(
        f"transfer-{id}",
        "5: refusals: no cpr channel with unix:: abort",
        source(),
        qemu=[
            talk("migrate", {"uri": uri}, "setup", "EOF"),
            exits(ABORTED, "**", like(r".*cpr_state_save: assertion failed: \(channel\)")),
        ],
        cpr=[refused("migrate", {"uri": uri}, "missing 'cpr' migration channel"), running()],
    )


def bad_option(id: str, options: str) -> Row:
    return Row(
        f"transfer-{id}",
        "5: refusals: cpr channel not unix",
        start(guest(f"{DEFER} -incoming {options}")),
        exits(1, BAD_SOCKET),
    )


# The suite as the other side.


@step
def listen_for_both(lab: Lab) -> None:
    """Listens on the cpr channel, and takes the stream on the main one into $dir/state."""
    lab.sockets.append(listen_unix(lab.path("$dir/cpr.sock")))
    listener = listen_unix(lab.path("$dir/main.sock"))
    lab.pumps["main"] = Pump(connection_to(listener), to_file(lab.path("$dir/state")))


@step
def take_cpr_state(lab: Lab) -> None:
    """The CPR state comes, each descriptor with a blank; then the VMM waits for us to hang up."""
    listener = lab.sockets[0]
    listener.settimeout(DEADLINE)
    connection = listener.accept()[0]
    with connection:
        connection.settimeout(DEADLINE)
        data, fds = b"", []
        while True:
            more, sent, _, _ = socket.recv_fds(connection, 1 << 16, 16)
            if not more:
                break
            data += more
            fds += sent
        lab.fds += fds
        entries = decode(data, fd_size=1)
        descriptors = lab.vm.process.descriptors().values()
        ours = sorted(
            (each.target, each.inode) for each in descriptors if each.target.startswith("/memfd:")
        )
        theirs = sorted((os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_ino) for fd in fds)
        expect("descriptors", ours, theirs, lab.names)
        expect("number of entries", len(fds), len(entries), lab.names)
        expect("RAM", True, "ram0" in [name for name, _, _ in entries], lab.names)


@step
def main_is_whole(lab: Lab) -> None:
    lab.pumps["main"].wait()


@step
def send_cpr_state(lab: Lab) -> None:
    """Sends the captured CPR state as a source does, and waits for the VMM to hang up."""
    capture = lab.target.capture
    lab.path("$dir/state").write_bytes(capture.stream.data)
    whole = encode([])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE)
        path = str(lab.path("$dir/cpr.sock"))
        if not until(lambda: connection.connect_ex(path) == 0):
            raise Mismatch("nobody listens on the cpr channel")
        head = whole[:8]
        for name, id, fd in capture.entries:
            element = encode([(name, id, 0)])[8 : -len(whole[8:]) - 4]
            socket.send_fds(
                connection, [head + element + BLANK], [memfd(lab, capture.contents[fd])]
            )
            head = b""
        connection.sendall(whole[8:])
        connection.shutdown(socket.SHUT_WR)
        expect("answer on the cpr channel", b"", connection.recv(1), lab.names)
    lab.vm.count = capture.count


ROWS = [
    Row(
        "transfer",
        "5: cpr-transfer",
        source(),
        destination(BOTH),
        on("src", talk("migrate", channels(), "setup", "{}")),
        on("dst", connect()),
        on("src", events(*SENT)),
        transferred(),
        same_ram(),
    ),
    Row(
        "transfer-defer",
        "5: cpr-transfer: defer",
        source(),
        destination(f"{DEFER} {CPR_KEYVAL}"),
        on("src", talk("migrate", channels(), "setup", "{}"), status("running"), counting()),
        migration({"status": "setup"}),
        on("dst", connect(), status("inmigrate"), migration({}), capabilities("events")),
        talk("migrate-incoming", {"uri": "unix:$dir/main.sock"}, "setup", "{}"),
        events("active", "RESUME", "completed"),
        on("src", events(*SENT)),
        transferred(),
        same_ram(),
    ),
    Row(
        "transfer-paused",
        "5: cpr-transfer",
        boot(guest(), "src"),
        counting(),
        qmp("stop"),
        capabilities("events"),
        parameters(mode="cpr-transfer"),
        destination(BOTH),
        on("src", forget_events(), talk("migrate", channels(), "setup", "{}")),
        events("active", "pass:2", "device", "completed"),
        on("dst", connect(), comes_to("paused"), still()),
        talk("cont", None, "RESUME", "{}"),
        went_on_from("src"),
        counting(),
    ),
    Row(
        "transfer-source-afterwards",
        "5: cpr-transfer: src ends in postmigrate; cont there",
        source(),
        destination(BOTH),
        on("src", talk("migrate", channels(), "setup", "{}")),
        on("dst", connect(), comes_to("running")),
        on("src", events(*SENT)),
        comes_to("postmigrate"),
        refused("migrate", channels(), POSTMIGRATE),
        refused("cont", None, 'Failed to get "write" lock'),
        stderr(
            'Failed to get "write" lock',
            "Is another process using the image [$dir/guest.img]?",
        ),
        comes_to("postmigrate"),
        talk("quit", None, "SHUTDOWN host-qmp-quit", "{}", "EOF"),
        on("dst", counting()),
    ),
    Row(
        "transfer-then-exec",
        "5: cpr-transfer",
        source(),
        destination(BOTH),
        on("src", talk("migrate", channels(), "setup", "{}")),
        on("dst", connect(), comes_to("running"), went_on_from("src")),
        on("src", qmp("quit")),
        on("dst", update(options=guest()), survives()),
    ),
    Row(
        "transfer-cancel",
        "4: migrate_cancel at pre-switchover",
        source(),
        destination(f"{DEFER} {CPR_OPTION}"),
        on("src", talk("migrate", channels(), "setup", "{}")),
        on("dst", connect(), status("inmigrate")),
        on("src", qmp("migrate_cancel", None, {}), events("cancelling", "cancelled")),
        migration({"status": "cancelled"}),
        running(),
    ),
    Row(
        "transfer-stop-while-waiting",
        "5: cpr-transfer: defer",
        source(),
        destination(f"{DEFER} {CPR_OPTION}"),
        on("src", talk("migrate", channels(), "setup", "{}")),
        on("dst", connect(), status("inmigrate")),
        on("src", talk("stop", None, "STOP", "{}"), status("paused")),
        talk("cont", None, "RESUME", "{}"),
        running(),
    ),
    *(
        Row(
            f"transfer-state-and-cpr-channel{name}",
            "1: state present + 'cpr' channel",
            take_over(more=f"{more} {CPR_KEYVAL}"),
            connect(),
            comes_to(runstate),
            stderr("warning: ignoring cpr channel for migration mode cpr-exec"),
        )
        for name, more, runstate in (
            ("", INCOMING, "running"),
            ("-defer", DEFER, "inmigrate"),
        )
    ),
    refusal("to-file", {"uri": FILE}, STREAMABLE),
    refusal("main-to-file", channels(main=MAIN_FILE), STREAMABLE),
    no_cpr_channel("no-cpr-channel", "unix:$dir/main.sock"),
    set_up("cpr-to-file", channels(cpr=MAIN_FILE), BAD_ADDRESS),
    set_up("cpr-to-inet", channels(cpr=INET), BAD_ADDRESS),
    set_up("nobody", channels(), NOBODY),
    Row(
        "transfer-private-ram",
        "5: refusals: RAM",
        source(guest(ram=PRIVATE)),
        migration({"blocked-reasons": [incompatible("ram0")]}),
        refused("migrate", channels(), incompatible("ram0")),
        running(),
    ),
    Row(
        "transfer-no-aux",
        "5: refusals: no aux",
        source(guest(machine="-machine pc,memory-backend=ram0")),
        refused("migrate", channels(), like(NOT_COMPATIBLE.format("(?!ram0).+"))),
        blocked_by("pc.bios", "pc.rom"),
        running(),
    ),
    bad_option(
        "cpr-option-inet", "cpr,addr.transport=socket,addr.type=inet,addr.host=h,addr.port=1"
    ),
    bad_option("cpr-option-file", "cpr,addr.transport=file,addr.filename=$dir/c,addr.offset=0"),
    Row(
        "transfer-wire",
        "5: wire of the cpr socket",
        listen_for_both(),
        source(),
        talk("migrate", channels(), "setup", "{}"),
        take_cpr_state(),
        events(*SENT),
        main_is_whole(),
        stream_is_well_formed(),
        comes_to("postmigrate"),
    ),
    Row(
        "transfer-wire-in",
        "5: wire of the cpr socket",
        start(guest(BOTH)),
        send_cpr_state(),
        connect(),
        deliver("unix"),
        survives(),
    ),
    Row(
        "transfer-destination-dies",
        "5: failure before the switchover",
        source(),
        destination(f"{DEFER} {CPR_OPTION}"),
        on("src", talk("migrate", channels(), "setup", "{}")),
        on("dst", connect(), killed()),
        on("src", events("failing", "failed")),
        migration({"status": "failed", "error-desc": str}),
        running(),
    ),
]
