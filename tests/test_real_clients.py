"""A full cpr-exec driven by clients that are not ours: the qemu.qmp library, and a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import select
import subprocess
import time

import pytest
from harness.vm import ROOT, VMM

qmp = pytest.importorskip("qemu.qmp")

BANNER = "QEMU 11.1.3 monitor - type 'help' for more information"
TIMEOUT = 20


async def connect(path, status):
    """Connects as a management tool must: again while the old image is still there, or none."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        client = qmp.QMPClient("test")
        try:
            await client.connect(path)
            if (await client.execute("query-status"))["status"] == status:
                return client
            await client.disconnect()
        except (qmp.ConnectError, qmp.ExecInterruptedError, EOFError, OSError):
            with contextlib.suppress(Exception):
                await client.disconnect()
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def drive(path, state, command):
    """One update by QEMU's own commands; returns the events of the source and the new status."""
    client = await connect(path, "running")
    await client.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
    )
    words = [*command, "-incoming", "defer"]
    await client.execute("migrate-set-parameters", {"mode": "cpr-exec", "cpr-exec-command": words})
    statuses = []
    with client.listener(("MIGRATION", "STOP")) as events:
        await client.execute("migrate", {"uri": f"file:{state}"})
        async for event in events:
            statuses.append(event.get("data", {}).get("status", event["event"]))
            if statuses[-1] in ("completed", "failed"):
                break
    with contextlib.suppress(EOFError):  # the exec may be faster
        await client.disconnect()
    client = await connect(path, "inmigrate")
    with client.listener("RESUME") as events:
        main = {"transport": "file", "filename": state, "offset": 0}
        channels = [{"channel-type": "main", "addr": main}]
        await client.execute("migrate-incoming", {"channels": channels})
        await asyncio.wait_for(events.get(), TIMEOUT)
    status = await client.execute("query-status")
    await client.disconnect()
    return statuses, status


def test_the_qmp_library_of_qemu(guests, accel, tmp_path):
    path = str(tmp_path / "qmp.sock")
    monitor = ["-qmp", f"unix:{path},server=on,wait=off"]
    command = [*VMM, "examples/heartbeat.cfg", "-accel", accel, "-monitor", "none", *monitor]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL) as vmm:
        try:
            for _ in range(2):
                statuses, status = asyncio.run(drive(path, str(tmp_path / "state"), command))
                assert statuses == ["setup", "STOP", "active", "device", "completed"]
                assert status == {"status": "running", "running": True}
                assert vmm.poll() is None
        finally:
            vmm.kill()


class Terminal:
    """A VMM with its monitor on a pty, as a person at a terminal has it."""

    def __init__(self, command):
        pid, self.fd = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execvp(command[0], command)
        self.pid = pid
        self.text = ""

    def wait_for(self, pattern):
        """Reads until `pattern` is in what has come since the last match; returns the match."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            plain = re.sub(r"\x1b\[[KD]", "", self.text)
            if match := re.search(pattern, plain):
                self.text = plain[match.end() :]
                return match
            assert time.monotonic() < deadline, f"no {pattern!r} in {plain!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.text += os.read(self.fd, 4096).decode(errors="replace")

    def type(self, line):
        os.write(self.fd, line.encode() + b"\r")


def test_a_person_at_a_terminal(guests, accel):
    terminal = Terminal([*VMM, "examples/heartbeat.cfg", "-accel", accel])
    terminal.wait_for(re.escape(BANNER))
    for line in ("cpr-exec", "cpr-exec"):
        terminal.wait_for(r"\(qemu\) ")
        terminal.type(line)
    terminal.wait_for(r"cpr-exec\s*\(qemu\) ")
    terminal.type("info status")
    terminal.wait_for("VM status: running")
    terminal.type("cpr-exec /nonexistent/vmm")
    terminal.wait_for("execvp /nonexistent/vmm failed: No such file or directory")
    terminal.type("info migrate")
    terminal.wait_for(r"Status: \t*\s*failed \(execvp /nonexistent/vmm failed")
    terminal.type("quit")
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    os.close(terminal.fd)
