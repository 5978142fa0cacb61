"""What no program should do, and what only large ones do: each is told, or it works."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_programs import command, environment, run, write

from cpr import live
from cpr.live import testing

BAD: list[tuple[str, Callable[[], Any]]] = [
    ("allow=3 is neither", lambda: live.update(["new"], allow=3)),
    ("'/bin/false x' is no list of words", lambda: live.update("/bin/false x")),
    (r"\[1, 2\] is no list of words", lambda: live.update([1, 2])),
    ("'a\\\\x00b' has a NUL byte", lambda: live.update(["a\0b"])),
    ("empty command", lambda: live.update([""])),
    ("'a=b'='c', which no environment", lambda: live.update(["new"], env={"a=b": "c"})),
    ("does not map words to words", lambda: live.update(["new"], env={"a": 1})),
    ("a timeout of 'x' s is none", lambda: live.update(["new"], timeout="x")),
    ("a timeout of inf s is none", lambda: live.update(["new"], timeout=float("inf"))),
    ("a timeout of 1e\\+30 s is none", lambda: live.rehearse(["new"], timeout=1e30)),
    ("version='x' is none", lambda: live.on_save(lambda: 1, version="x")),
    ("version=-1 is none", lambda: live.state(version=-1)),
    ("'m': a memory of True bytes", lambda: live.memory("m", True)),
    ("'b' is not there, and None cannot be called", lambda: live.socket("b", None)),
    ("no option nosuch=5", lambda: live.update_on(signal.SIGUSR2, nosuch=5)),
    ("mode 'x' is neither", lambda: live.update_on(signal.SIGUSR2, mode="x")),
    ("no update can be made at signal 9", lambda: live.update_on(signal.SIGKILL)),
]


@pytest.mark.parametrize(("text", "call"), BAD, ids=range(len(BAD)))
def test_what_makes_no_sense_is_named(text: str, call: Callable[[], Any]) -> None:
    with testing.fake() as process:
        with pytest.raises((live.UpdateError, TypeError, ValueError), match=text):
            call()
        assert process.updates == 0 and live.names() == []
        assert process.run(live.update, ["new"], allow="thread")


NESTED = """
import signal, threading
if len(sys.argv) > 1:
    say("state", live.state())
    live.ready()
    raise SystemExit
NEW = [PYTHON, __file__, "new"]
reasons = []
def save():
    if not reasons:
        reasons.append(fails(["/bin/false"]).reason)
        return live.rehearse(NEW)
    return reasons
def on_signal(number, frame):
    reasons.append(fails(["/bin/false"]).reason)
signal.signal(signal.SIGUSR1, on_signal)
live.on_save(save)
live.ready()
live.ready()
for mode in ("early", "late"):
    reasons.clear()
    error = fails(NEW, mode=mode)
    say("nested", reasons[0], error.reason, error.pid_changed)
code = "import os, signal, time; os.kill(max(map(int, open('/proc/self/task/%d/children' "
code += "% os.getpid()).read().split())), signal.SIGUSR1); time.sleep(0.2); raise SystemExit(5)"
error = fails([PYTHON, "-c", code])
say("signal", reasons[1], error.status)
thread = threading.Thread(target=lambda: reasons.append(fails(NEW, allow="thread")), name="other")
thread.start()
thread.join()
say("thread", reasons[2].reason, reasons[2].pid_changed)
del reasons[2]
live.update(NEW)
"""


def test_there_is_one_update_at_a_time_and_the_main_thread_makes_it(tmp_path: Path) -> None:
    result = run(tmp_path, NESTED)
    under_way = "an update is under way already"
    failed = f"save, of on_save, failed: {under_way}"
    nested = result.of("nested")
    assert nested == [[under_way, failed, True], [under_way, failed, False]], result.stderr
    assert result.of("signal") == [[under_way, 5]]
    ((reason, pid_changed),) = result.of("thread")
    assert "main thread" in reason and "'other'" in reason and not pid_changed
    assert result.of("state") == [[[under_way, under_way]]], result.stderr


MANY = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
mode, count = sys.argv[1], int(sys.argv[2])
if not live.generation:
    live.keep("stderr", sys.stderr)
    live.keep("same", 2)
    for number in range(count):
        live.keep(f"n{number:06}", os.eventfd(number))
    live.ready()
    code = "from cpr import live; live.names(); 1 / 0"
    say("failed", fails([PYTHON, "-c", code], mode=mode).status)
    say("open", len(os.listdir("/proc/self/fd")) - count)
    live.update(mode=mode, guard=sys.argv[3])
numbers = [os.eventfd_read(live.get(name)) for name in live.names("n") if name != "n000000"]
live.get("stderr").write("written\\n")
live.ready()
apart = len({2, live.get("stderr").fileno(), live.get("same")})
say("new", numbers == list(range(1, count)), apart, live.audit())
"""


@pytest.mark.parametrize(("mode", "guard"), [("early", "fork"), ("late", "fork"), ("late", "vm")])
def test_thousands_of_descriptors_go_over(tmp_path: Path, mode: str, guard: str) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = min(hard - 200, 6000)
    result = run(tmp_path, MANY, mode, str(count), guard)
    assert result.of("new") == [[True, 3, []]], result.stderr
    assert result.of("failed") == [[1]] and "written" in result.stderr
    assert result.of("open")[0][0] < 20


SHORT = """
import resource
mode = sys.argv[1]
COMES = "from cpr import live; live.state(); raise SystemExit(7)"
memory = live.memory("memory", 4096)
if live.generation:
    say("new", len(live.state()), bytes(memory[:2]).decode())
    live.ready()
    raise SystemExit
memory[:2] = b"hi"
live.on_save(lambda: "x" * (30 << 20))
live.ready()
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
for name, number, limit in (
    ("page", resource.RLIMIT_AS, size),
    ("state", resource.RLIMIT_AS, size + (16 << 20)),
    ("file", resource.RLIMIT_FSIZE, 1000),
):
    soft, hard = resource.getrlimit(number)
    resource.setrlimit(number, (limit, hard))
    try:
        live.update([PYTHON, "-c", COMES], mode=mode)
    except live.UpdateError as failed:
        error = failed
    resource.setrlimit(number, (soft, hard))
    say(name, error.reason, error.status, bytes(memory[:2]).decode(), live.names())
live.update(mode=mode)
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_want_of_memory_is_said_and_nothing_is_lost(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, SHORT, mode)
    found = {line[0]: line[1:] for line in result.lines}
    assert found["new"] == [30 << 20, "hi"], result.stderr
    for name in ("page", "state", "file"):
        assert found[name][2:] == ["hi", ["memory"]]
    assert "Cannot allocate memory" in found["page"][0]
    # A new program has less memory of its own, and may be the one that fails.
    assert "no memory" in found["state"][0] or found["state"][1] is not None
    assert "File too large" in found["file"][0] or found["file"][1] is not None


SHARED = """
import errno
try:
    os.close(os.open("/dev/shm/file", os.O_CREAT | os.O_RDWR))
except OSError as error:
    say("shm", errno.errorcode[error.errno])
memory = live.memory("memory", 1 << 20)
say("at", live.generation, memory[-1], live.state(default="none"))
live.on_save(lambda: "x" * 100000)
live.ready()
memory[-1] = 7
if not live.generation:
    live.update(mode=sys.argv[1])
"""


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize(("options", "expected"), [("ro", "EROFS"), ("nr_inodes=1", "ENOSPC")])
def test_dev_shm_is_not_needed(tmp_path: Path, options: str, expected: str, mode: str) -> None:
    mount = f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", mount, "sh", *command(write(tmp_path, SHARED), mode)]
    result = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
    if "permitted" in result.stderr or "denied" in result.stderr:
        pytest.skip(f"/dev/shm cannot be mounted over: {result.stderr}")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == [
        ["shm", expected],
        ["at", 0, 0, "none"],
        ["shm", expected],
        ["at", 1, 7, "x" * 100000],
    ], result.stderr


KEPT = """
import random, signal
mode, guard = sys.argv[1:3]
random.seed(5)
expected = [random.random() for _ in range(3)]
random.seed(5)
ticks = []
signal.signal(signal.SIGALRM, lambda *words: ticks.append(1))
live.ready()
found = [random.random()]
signal.setitimer(signal.ITIMER_REAL, 0.2, 0.01)
NEW = [PYTHON, "-c", "import time; time.sleep(0.5); raise SystemExit(3)"]
error = fails(NEW, mode=mode, guard=guard)
found.append(random.random())
while len(ticks) < 3:
    time.sleep(0.01)
fails(["/nonexistent"], mode=mode, guard=guard)
found.append(random.random())
say("kept", error.status, found == expected, signal.getitimer(signal.ITIMER_REAL)[1] > 0)
"""


@pytest.mark.parametrize("guard", ["fork", "vm"])
@pytest.mark.parametrize("mode", ["early", "late"])
def test_timers_and_random_numbers_go_on(tmp_path: Path, mode: str, guard: str) -> None:
    result = run(tmp_path, KEPT, mode, guard)
    assert result.of("kept") == [[3, True, True]], result.stderr


GONE = """
import signal
live.update_on(signal.SIGHUP)
live.ready()
os.mkdir("gone")
os.chdir("gone")
os.rmdir("../gone")
before = os.stat(".").st_ino
error = fails([PYTHON, "-c", "raise SystemExit('last words')"])
say("gone", error.stderr, os.stat(".").st_ino == before)
mask = list(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
error = fails(None, env={"PYTHONHOME": "/nonexistent"})
say("here", error.status, os.stat(".").st_ino == before, mask)
os.chdir("/")
os.rename(sys.argv[1], sys.argv[1] + ".moved")
error = fails(None)
say("moved", error.reason, error.pid_changed, list(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
print("still", file=sys.stderr)
"""


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    result = run(folder, GONE, str(folder))
    assert result.of("gone") == [[["last words"], True]], result.stderr
    assert result.of("here") == [[1, True, []]]
    assert result.of("moved") == [[f"{folder}: No such file or directory", False, []]]
    assert result.stderr.endswith("still\n")
