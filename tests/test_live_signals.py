"""Signals to a PID whose program is being replaced, and what it had blocked."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

TWICE = """
import signal
mode, guard = sys.argv[1:3]
if not live.generation:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
live.state()
if live.generation == 1:  # the second signal comes while this program starts
    os.kill(os.getpid(), signal.SIGHUP)
live.update_on(signal.SIGHUP, mode=mode, guard=guard)
live.ready()
mask = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
say("ready", live.generation, os.getpid(), mask)
if not live.generation:
    os.kill(os.getpid(), signal.SIGHUP)
"""


@pytest.mark.parametrize(("mode", "guard"), [("early", "fork"), ("late", "vm")])
def test_a_signal_while_the_new_program_starts_waits(tmp_path: Path, mode: str, guard: str) -> None:
    result = run(tmp_path, TWICE, mode, guard)
    ready = result.of("ready")
    assert [line[0] for line in ready] == [0, 2], result.stderr  # the signal comes in ready()
    assert len({line[1] for line in ready}) == 1
    assert all(line[2] == [10, 15] for line in ready)


WITHIN = """
import signal, threading
mode, guard = sys.argv[1:3]
serving, ending = None, threading.Event()
def pages():  # of the update that this program has come by
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            pass
    return links.count("/memfd:cpr-live (deleted)")
@live.on_pause
def pause():
    global serving
    say("pause", live.generation, serving is not None, pages(), wait_alone())
    if serving is not None:
        ending.set()
        serving.join()
        serving = None
@live.on_resume
def resume():
    global serving
    if serving is None:
        ending.clear()
        serving = threading.Thread(target=ending.wait, name="serve")
        serving.start()
live.state()
live.update_on(signal.SIGHUP, argv=["/bin/false"], guard=guard, on_error=lambda error:
               say("failed", live.generation, error.status))
if live.generation:
    os.kill(os.getpid(), signal.SIGHUP)
live.ready()
resume()
say("threads", live.generation, sum(each.name == "serve" for each in threading.enumerate()))
if not live.generation:
    live.update(mode=mode, guard=guard)
pause()
"""


@pytest.mark.parametrize(("mode", "guard"), [("early", "fork"), ("late", "vm")])
def test_an_update_within_ready_begins_when_all_else_is_done(
    tmp_path: Path, mode: str, guard: str
) -> None:
    result = run(tmp_path, WITHIN, mode, guard)
    assert result.of("failed") == [[1, 1]], result.stderr
    assert [1, False, 0, ""] in result.of("pause"), result.stderr
    assert result.of("threads") == [[0, 1], [1, 1]]


FORKED = """
import asyncio, signal, socket
kind = sys.argv[1]
live.on_save(lambda: None)
if pid := os.fork() if not live.generation else 0:  # it becomes a daemon
    os.waitpid(pid, 0)
    raise SystemExit
def refused(error):
    say("refused", error.reason.replace(str(os.getppid()), "OLD").replace(str(os.getpid()), "NEW"))
live.update_on(signal.SIGHUP, on_error=refused)
live.ready()
if live.generation:
    say("new", os.getpid())
    raise SystemExit
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind("manager")
def work():
    live.ready()  # it serves, and is no program of its own
    manager.recv(99)
    async def be_told():
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0)
        await asyncio.gather(*live.aio._tasks)
    if kind == "aio":
        asyncio.run(be_told())
    else:
        os.kill(os.getpid(), signal.SIGHUP)
    os._exit(0)
os.environ["NOTIFY_SOCKET"] = os.path.abspath("manager")
if (worker := os.fork()) == 0:
    work()
os.waitpid(worker, 0)
try:
    say("said", manager.recv(99, socket.MSG_DONTWAIT).decode())
except BlockingIOError:
    pass
del os.environ["NOTIFY_SOCKET"]
failed = fails(["/bin/false"])  # the guard is another process, and may
say("old", failed.status, failed.pid_changed, os.getpid())
live.update()
"""


@pytest.mark.parametrize("kind", ["plain", "aio"])
def test_a_forked_worker_does_not_update(tmp_path: Path, kind: str) -> None:
    """There would be two services, and systemd would hear of the wrong one."""
    result = run(tmp_path, FORKED, kind)
    text = "only the program's own process, PID OLD, updates itself; this one, PID NEW, was forked "
    assert result.of("refused") == [[f"{text}from it"]], result.stderr
    assert not result.of("said")
    ((status, pid_changed, pid),) = result.of("old")
    assert (status, pid_changed) == (1, True) and result.of("new") == [[pid]], result.stderr
