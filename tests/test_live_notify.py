"""systemd: what a unit's manager hears, and the descriptors that it passes."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

from live_programs import Result, run

SERVICE = """
import socket
sock = live.socket("web:1", lambda: socket.create_server(("127.0.0.1", 0)))
live.ready()
if live.generation == 0:
    NEW = [PYTHON, "-c", "import socket; from cpr import live; live.state();"
           "live.socket('admin', socket.socket); live.drop('web:1'); live.notify.status('up');"]
    assert live.rehearse([*NEW[:2], NEW[2] + "live.ready()"])
    say("old", os.getpid(), fails([*NEW[:2], NEW[2].replace("status", "no_such")]).pid_changed)
    say("pid", os.getpid())
    live.update()
live.drop("web:1")
"""


def serve(folder: Path, source: str) -> tuple[Result, list[str], int]:
    """Runs it under a manager: what that was told, and how many descriptors it has got."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        said: list[str] = []
        stored: list[int] = []

        def listen() -> None:
            while (packet := socket.recv_fds(manager, 4096, 5))[0] != b"end":
                said.append(packet[0].decode())
                stored.extend(packet[1])

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            result = run(folder, source, NOTIFY_SOCKET=str(folder / "notify"))
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"end", str(folder / "notify"))
            thread.join()
    for fd in stored:
        os.close(fd)
    return result, said, len(stored)


def test_what_is_said(tmp_path: Path) -> None:
    result, said, stored = serve(tmp_path, SERVICE)
    first, changed = result.of("old")[0]
    second = result.of("pid")[0][0]
    assert changed and first != second
    reloading = [text for text in said if text.startswith("RELOADING=1\nMONOTONIC_USEC=")]
    assert len(reloading) == 2
    assert [text for text in said if text not in reloading and not text.startswith("MAINPID")] == [
        "FDSTORE=1\nFDNAME=web%3A1",
        "READY=1",
        "READY=1",
        "FDSTORE=1\nFDNAME=web%3A1",
        "READY=1",
        "FDSTOREREMOVE=1\nFDNAME=web%3A1",
    ]
    pids = [text for text in said if text.startswith("MAINPID")]
    assert pids[0] == f"MAINPID={second}"
    assert pids[-1] == f"MAINPID={second}"
    assert stored == 2


REFUSED = """
import asyncio, threading
ending = threading.Event()
thread = threading.Thread(target=ending.wait)
live.ready()
async def update():
    await live.aio.update(["/bin/false"])
def all_ways():
    say("refused", fails(["/bin/false"]).pid_changed)
    try:
        asyncio.run(update())
    except live.UpdateError as error:
        say("refused", error.pid_changed)
thread.start()  # what is refused by itself
all_ways()
ending.set()
thread.join()
live.on_pause(lambda: 1 / 0)
all_ways()
"""


def test_an_update_that_is_refused_ends_a_reload(tmp_path: Path) -> None:
    """systemd takes READY for its end after RELOADING only."""
    result, said, _ = serve(tmp_path, REFUSED)
    assert result.of("refused") == [[False]] * 4, result.stderr
    words = [text.partition("=")[0] for text in said]
    assert words == ["READY", *["RELOADING", "MAINPID", "READY"] * 4]


DROPPED = """
import socket
if live.generation == 0:
    live.socket("web", lambda: socket.create_server(("127.0.0.1", 0)))
if live.generation < 2:
    live.names()
    live.ready()
    live.update()
live.drop("web")
say("dropped", live.names())
live.ready()
"""


def test_what_a_program_before_has_stored_is_removed(tmp_path: Path) -> None:
    """Two updates later, and no program in between has asked for it: else it comes back."""
    result, said, stored = serve(tmp_path, DROPPED)
    assert result.of("dropped") == [[[]]] and stored == 1, result.stderr
    assert [text for text in said if "FDSTORE" in text] == [
        "FDSTORE=1\nFDNAME=web",
        "FDSTOREREMOVE=1\nFDNAME=web",
    ]


PASSED = """
import socket
os.environ["LISTEN_PID"] = str(os.getpid())
first = live.socket("web", lambda: 1 / 0)
say("web", first.getsockname()[1], "LISTEN_FDS" in os.environ)
say("admin", live.socket("ü:%", lambda: 1 / 0).fileno())
made = live.socket("other", socket.socket)
say("other", made.fileno() > 4)
live.ready()
"""

PASSING = """
import os, socket, sys
web, admin = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
os.write(1, (f'["port", {web.getsockname()[1]}]' + chr(10)).encode())
first, second = os.dup(web.fileno()), os.dup(admin.fileno())
os.dup2(first, 3), os.dup2(second, 4)
os.environ.update(LISTEN_FDS="2", LISTEN_FDNAMES="web:%C3%BC%3A%25")
os.execv(sys.executable, [sys.executable, "passed.py"])
"""


def test_passed_sockets_are_found_by_name(tmp_path: Path) -> None:
    from live_programs import write

    write(tmp_path, PASSED, "passed.py")
    result = run(tmp_path, PASSING)
    port = result.of("port")[0][0]
    assert result.of("web") == [[port, False]], result.stderr
    assert result.of("other") == [[True]] and result.of("admin") == [[4]]
