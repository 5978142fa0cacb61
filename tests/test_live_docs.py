"""The Python of docs/live.md."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from live_programs import ROOT, command, environment

TEXT = (ROOT / "docs" / "live.md").read_text()
SERVER, TEST = re.findall(r"```python\n(.*?)```", TEXT, re.S)
NAMES = re.findall(r"^\| (`.*?) \|", TEXT.partition("| name |")[2].partition("\n## ")[0], re.M)


def test_every_name_is_described() -> None:
    from cpr import live

    described = set(re.findall(r"[a-z_]\w+", " ".join(NAMES)))
    types = {"Finding", "PreserveError", "Previous", "UpdateError", "Verdict"}
    assert set(dir(live)) - types <= described


def test_the_unit_test_of_the_page() -> None:
    exec(TEST.replace('mode="late"', 'mode="late", allow="thread"'), {})


def connect(port: int) -> socket.socket:
    for _ in range(500):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError("nothing listens")


@pytest.mark.parametrize("change", ["good", "bad"])
def test_the_server_of_the_page(tmp_path: Path, change: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "server.py"
    path.write_text(SERVER.replace("7000", str(port)))
    process = subprocess.Popen(
        command(path), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        with connect(port) as sock, sock.makefile("rwb", buffering=0) as file:
            file.write(b"one\n")
            assert file.readline() == b"1 one\n"
            text = path.read_text().replace('b"%d %s"', 'b"new %d %s"')
            path.write_text(text if change == "good" else "no_such_name\n")
            parent = psutil.Process(process.pid)
            (child,) = parent.children()
            child.send_signal(signal.SIGHUP)
            answer = b""
            count = 1
            for _ in range(500):
                file.write(b"two\n")
                count += 1
                answer = file.readline()
                assert answer.endswith(b"%d two\n" % count)
                if answer.startswith(b"new") or parent.children() != [child]:
                    break
                time.sleep(0.02)
            assert answer.startswith(b"new") == (change == "good")
            file.write(b"three\n")
            assert file.readline().endswith(b"%d three\n" % (count + 1))
            if change == "good":
                assert parent.children() == [child]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
