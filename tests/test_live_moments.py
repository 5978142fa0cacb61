"""cpr.live: what comes at a bad moment of an update."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

# The new program sends a signal to its group, which the guard is in, and ends.
SIGNAL = """
import signal
mode, guard, number = sys.argv[1], sys.argv[2], signal.Signals[sys.argv[3]]
def raises(*arguments):
    raise InterruptedError("by the handler")
signal.signal(number, raises)
live.ready()
word = number.name.removeprefix("SIG")
script = f"trap '' {word}; kill -{word} 0; sleep 0.1; exit 3"
try:
    live.update(["/bin/sh", "-c", script], mode=mode, guard=guard, timeout=20)
except (live.UpdateError, InterruptedError):
    say("goes on")
"""

# The new program is ended by a signal while the old one, or a part of it, comes to rest for it.
DIES = """
import asyncio, signal, threading
what = sys.argv[1]
if len(sys.argv) > 2:
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    live.state()
busy, ended, old = what, threading.Event(), os.getpid()

async def on_client(reader, writer):
    while await reader.readline():
        while busy == "handler":
            await asyncio.sleep(0.01)

async def stop():
    while busy == "on_stop":
        await asyncio.sleep(0.01)

async def main():
    global busy
    live.aio.on_stop(stop)
    live.on_save(lambda: time.sleep(1) if busy == "on_save" else None)
    await live.aio.start_server("dies", on_client, path="dies.sock")
    live.ready()
    reader, writer = await asyncio.open_unix_connection("dies.sock")
    writer.write(b"line\\n")
    await asyncio.sleep(0.1)
    update = asyncio.create_task(live.aio.update([PYTHON, __file__, what, "new"], timeout=10))
    while os.getpid() == old:
        await asyncio.sleep(0.01)
    job = asyncio.create_task(asyncio.to_thread(ended.wait)) if what == "executor" else None
    try:
        await update
    except live.UpdateError as error:
        say("died", error.signal, error.reason)
    busy = None
    ended.set()

asyncio.run(main())
"""

REDIRECTED = """
live.ready() if live.generation == 0 else None
if live.generation == 0:
    live.update(timeout=20)
if sys.argv[1] == "pipe":
    _, fd = os.pipe()
else:
    fd = os.open("log", os.O_CREAT | os.O_TRUNC | int(sys.argv[1]), 0o600)
os.dup2(fd, 2)
expected = os.fstat(fd)
live.ready()
os.write(2, b"logged")
say("ready", os.path.samestat(os.fstat(2), expected))
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("guard", ["fork", "vm"])
def test_a_handler_that_raises_in_the_guard(tmp_path: Path, guard: str, number: str) -> None:
    result = run(tmp_path, SIGNAL, "late", guard, number)
    assert result.lines == [["goes on"]], result.stderr


@pytest.mark.parametrize("what", ["handler", "on_stop", "executor", "on_save"])
def test_a_new_program_that_dies_is_not_waited_for(tmp_path: Path, what: str) -> None:
    result = run(tmp_path, DIES, what)
    reason = "the new program was ended by signal 14 before it took over"
    assert result.of("died") == [[14, reason]], result.stderr


@pytest.mark.parametrize("kind", ["pipe", "1", "2"])
def test_a_new_program_with_a_stderr_of_its_own(tmp_path: Path, kind: str) -> None:
    result = run(tmp_path, REDIRECTED, kind)
    assert result.lines == [["ready", True]], result.stderr
    if kind != "pipe":
        assert (tmp_path / "log").read_text() == "logged"
