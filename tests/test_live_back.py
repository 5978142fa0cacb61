"""After a refusal the old command is executed in the PID, where it is the same program still."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from live_programs import run

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
import threading
live.ready()
shared = lambda: int(next(l for l in open("/proc/meminfo") if l.startswith("Shmem:")).split()[1])
before, most = shared(), [0]
child = os.fork()
if child == 0:  # who looks at it: the old program may have no thread
    end = time.monotonic() + 60
    while os.getppid() != 1 and not os.path.exists(sys.argv[2]) and time.monotonic() < end:
        most[0] = max(most[0], shared() - before)
        time.sleep(0.01)
    say("most", most[0] < 150_000)
    os._exit(0)
said = "echo first >/dev/stderr; echo more >>/dev/stderr; "
said += "yes | head -c 300000000 >&2; sleep 0.2; echo last >&2; exit 3"
error = fails(["/bin/sh", "-ec", said], mode=sys.argv[1], allow=("child",))
open(sys.argv[2], "w").close()
say("flood", error.status, error.stderr[-1:])
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_what_a_new_program_says_is_bounded(tmp_path: Path, mode: str) -> None:
    """It is kept until it takes over; of what is too much the last is."""
    result = run(tmp_path, FLOOD, mode, str(tmp_path / "done"))
    assert result.of("flood") == [[3, ["last"]]], result.stderr[-2000:]
    assert result.of("most") == [[True]]
    assert result.stderr.endswith("last\n")


TALKS_ON = """
if len(sys.argv) > 2:
    if os.fork() == 0:
        try:
            while True:
                os.write(2, b"more\\n")
        except OSError as error:
            say("child", error.errno)
            os._exit(0)
    time.sleep(0.1)
    if sys.argv[2] == "dies":
        raise SystemExit(3)
    live.ready()
    say("new", live.generation)
    raise SystemExit
live.ready()
say("old", fails([PYTHON, __file__, sys.argv[1], "dies"], mode=sys.argv[1]).status)
live.update([PYTHON, __file__, sys.argv[1], "good"], mode=sys.argv[1])
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_child_that_goes_on_talking_holds_nobody_up(tmp_path: Path, mode: str) -> None:
    """What it has said is passed on; what it says when its parent has failed or taken over is not,
    and would grow."""
    result = run(tmp_path, TALKS_ON, mode)
    assert result.of("old") == [[3]] and result.of("new") == [[1]], result.stderr[-2000:]
    assert result.of("child") == [[errno.EPERM]] * 2
    assert "more\n" in result.stderr
