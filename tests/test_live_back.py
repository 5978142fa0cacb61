"""After a refusal the old command is executed in the PID, where it is the same program still."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

from cpr.live import last_words

BACK = """
import signal, socket
mode, what = sys.argv[1:3]
memory = live.memory("memory", 4096)
saved = live.state(default=[], version=3 - (what == "twice"))
live.on_save(lambda: [*saved, live.generation], version=3)
pid = os.getpid()
OLDER = [PYTHON, "-c", "from cpr import live; live.state(version=1)"]
if live.generation == 0:
    memory[0] = 7
    live.keep("one", socket.socketpair()[0])
    live.ready()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    if what == "changed":
        os.utime(__file__)
    error = fails(OLDER, mode=mode, back=what != "off")
    say("failed", error.reason, error.pid_changed, os.getpid() == pid, memory[0], live.names())
    raise SystemExit
before = live.predecessor
live.ready()
mask = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
wait_alone()
say("back", before.failure, before.pid == pid, saved, memory[0], live.names(), mask, live.audit())
print("said", file=sys.stderr)
error = fails(["/bin/false"], back=True)
say("again", live.generation, error.status, error.pid_changed)
"""


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize("what", ["back", "off", "changed", "twice"])
def test_the_old_command_has_the_pid_again(tmp_path: Path, what: str, mode: str) -> None:
    result = run(tmp_path, BACK, mode, what)
    reason = "version 3, and the new program knows version 1"
    if what == "back":
        ((failure, *rest),) = result.of("back")
        assert reason in failure
        assert rest == [True, [0], 7, ["memory", "one"], [10, 15], []]
        assert result.of("again") == [[1, 1, True]] and "said" in result.stderr
    else:
        ((failure, *rest),) = result.of("failed")
        assert rest == [True, False, 7, ["memory", "one"]]
        assert reason in failure and ("program.py has changed" in failure) == (what == "changed")
        assert ("the PID is not given back" in failure) == (what in ("changed", "twice"))


AIO = """
import asyncio, socket
mode = sys.argv[1]
OLDER = [PYTHON, "-c", "from cpr import live; live.state(version=0)"]
live.on_save(lambda: "state")
answers = []
async def on_client(reader, writer):
    while line := await reader.readline():
        writer.write(b"%d " % live.generation + line)
        await writer.drain()
async def main():
    server = await live.aio.start_server("lines", on_client, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    client = live.socket("client", lambda: socket.create_connection(address))
    before = live.predecessor
    live.ready()
    reader, writer = await asyncio.open_connection(sock=client.dup())
    writer.write(b"one\\n")
    say("answer", (await reader.readline()).decode())
    writer.transport.abort() if live.generation else writer.transport.pause_reading()
    if before:
        say("back", before.failure, before.pid == os.getpid())
        return
    await live.aio.update(OLDER, mode=mode, back=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_loop_serves_while_the_old_command_starts(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, AIO, mode)
    assert result.of("answer") == [["0 one\n"], ["1 one\n"]], result.stderr
    ((failure, same_pid),) = result.of("back")
    assert "knows version 0" in failure and same_pid


FLOOD = """
live.ready()
shared = lambda: int(next(l for l in open("/proc/meminfo") if l.startswith("Shmem:")).split()[1])
before = shared()
error = fails(["/bin/sh", "-c", "head -c 100000 /dev/zero | tr '\\\\0' y >&2; yes >&2; exit 3"])
say("flood", error.status, shared() - before < 50000)
"""


def test_what_a_new_program_says_is_bounded(tmp_path: Path) -> None:
    """It is kept until it takes over; who says more than that has an error."""
    result = run(tmp_path, FLOOD)
    assert result.of("flood") == [[3, True]], result.stderr[-2000:]
    assert last_words.MOST // 2 < len(result.stderr) < 2 * last_words.MOST
