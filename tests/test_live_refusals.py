"""What an update is refused for, what a new program refuses, and rehearsals."""

from __future__ import annotations

from pathlib import Path

import hung_mount
import pytest
from live_programs import run

AUDIT = """
import concurrent.futures, fcntl, subprocess, threading
live.ready()
assert live.audit() == [], live.audit()
FALSE = ["/bin/false"]

def expect(kind, allow):
    found = live.audit()
    error = fails(FALSE)
    say(kind, [each.kind for each in found], str(found[0]), error.reason, error.pid_changed)
    for word in allow:
        pid = os.getpid()
        error = fails(FALSE, allow=word)
        say("allowed", word, error.status, error.pid_changed)
        return

event = threading.Event()
thread = threading.Thread(target=event.wait, name="worker", daemon=True)
thread.start()
expect("thread", [])
event.set()
thread.join()

executor = concurrent.futures.ThreadPoolExecutor(1, "pool")
executor.submit(int).result()
expect("executor", [])
executor.shutdown()

child = subprocess.Popen(["/bin/sleep", "60"])
expect("child", [])
child.kill()
child.wait()

from multiprocessing import resource_tracker
resource_tracker.ensure_running()
expect("tracker", [])
resource_tracker._resource_tracker._stop()

lock = open("lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX, 1)
fcntl.lockf(lock, fcntl.LOCK_EX, 1, 10)
expect("lock", ["lock"])
fcntl.lockf(lock, fcntl.LOCK_UN)

leak = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(leak, True)
expect("leak", [leak])
live.keep("null", leak)
say("end", live.audit())
"""


def test_what_does_not_survive_is_refused_unless_allowed(tmp_path: Path) -> None:
    result = run(tmp_path, AUDIT)
    found = {line[0]: line[1:] for line in result.lines}
    assert found["end"] == [[]], result.stderr
    for word, kind, text in (
        ("thread", "thread", "thread worker: ends"),
        ("executor", "thread", "thread pool_0: ends"),
        ("child", "child", "the Popen is lost"),
        ("tracker", "child", "removes the shared memory"),
        ("lock", "lock", f"lock {tmp_path}/lock: is released"),
    ):
        kinds, description, reason, pid_changed = found[word]
        assert kinds == [kind] and not pid_changed
        assert text in description
        assert text in reason and f"allow='{kind}'" in reason
    assert found["leak"][0] == ["descriptor"] and "/dev/null leaks" in found["leak"][1]
    assert "exit status 1" in found["leak"][2]
    assert result.of("allowed")[0] == ["lock", 1, True]


HANGING = """
import fcntl
from hung_mount import open_hung
live.ready()
os.mkdir("mount")
open_hung("mount")
lock = open("lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
say("found", [str(each) for each in live.audit()])
"""


def test_a_lock_is_found_where_a_file_system_hangs(tmp_path: Path) -> None:
    """A descriptor of this program is on that one, too."""
    hung_mount.skip_without()
    result = run(tmp_path, HANGING, PYTHONPATH=hung_mount.environment()["PYTHONPATH"])
    ((found,),) = result.of("found")
    assert [text for text in found if text.startswith(f"lock {tmp_path}/lock: ")], found


VERSIONS = """
mode, step = sys.argv[1:3]
if step == "old":
    memory = live.memory("table", 4096)
    saved = []
    @live.on_save(version=3)
    def save_it():
        saved.append(1)
        return {"three": 3}
    live.ready()
    error = fails([PYTHON, __file__, mode, "new"], mode=mode)
    say("refused", error.reason, len(saved), live.names())
    error = fails([PYTHON, __file__, mode, "new"], mode=mode)
    live.update([PYTHON, __file__, mode, "newer"], mode=mode)
if step == "new":
    live.state(version=2)
say(step, live.state(version=4), live.memory("table", 4096)[0])
live.ready()
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_newer_state_is_refused_before_anything_is_handed_over(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, VERSIONS, mode, "old")
    (reason, saved, names), *_ = result.of("refused")
    assert reason == "the state of 'save_it' has version 3, and the new program knows version 2"
    assert saved == (0 if mode == "early" else 1) and names == ["table"]
    assert result.of("newer") == [[{"three": 3}, 0]] and not result.of("new"), result.stderr


REHEARSALS = """
if len(sys.argv) == 1:
    memory = live.memory("table", 4096)
    memory[0] = 5
    live.on_save(lambda: {"a": 1})
    live.ready()
    pid = os.getpid()
    for name, argv, timeout in (
        ("good", [PYTHON, __file__, "new"], 30),
        ("crash", [PYTHON, "-c", "import no_such_module"], 30),
        ("kill", [PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], 30),
        ("version", [PYTHON, "-c", "from cpr import live; live.state(version=0)"], 30),
        ("hang", ["/bin/sleep", "60"], 0.3),
        ("missing", ["/nonexistent"], 30),
    ):
        verdict = live.rehearse(argv, timeout=timeout)
        assert bool(verdict) == verdict.ok
        say(name, *verdict)
    with open(f"/proc/self/task/{pid}/children") as children:
        say("end", pid == os.getpid(), memory[0], children.read(), len(live.audit()))
else:
    memory = live.memory("table", 4096)
    assert live.state() == {"a": 1} and memory[0] == 5
    memory[0] = 6
    live.ready()
    os.write(2, b"not reached")
"""


def test_a_rehearsal_hands_nothing_over(tmp_path: Path) -> None:
    result = run(tmp_path, REHEARSALS)
    found = {line[0]: line[1:] for line in result.lines}
    assert found["end"] == [True, 5, "", 0], result.stderr
    assert found["good"] == [True, "", None, None, []]
    assert not found["crash"][0] and found["crash"][2] == 1
    assert "no_such_module" in found["crash"][4][-1]
    assert found["kill"][3] == 9
    assert "version 1" in found["version"][1] and "version 0" in found["version"][1]
    assert "did not take over" in found["hang"][1]
    assert "No such file" in found["missing"][1]


STAYS = """
import select, signal
guard = sys.argv[1]
def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return list(map(int, file.read().split()))
def refuse(pid, number):
    raise PermissionError(1, "Operation not permitted")
live.ready()
killpg, os.killpg = os.killpg, refuse  # as of another user's
say("stays", live.rehearse(["/bin/sleep", "600"], timeout=0.3).ok)
os.killpg = killpg
(pid,) = children()
say("audit", [(each.kind, each.name == str(pid), each.survives) for each in live.audit()])
say("exec", fails(["/nonexistent"], guard=guard).reason)
pidfd = os.pidfd_open(pid)
os.kill(pid, signal.SIGKILL)
select.select([pidfd], [], [])
say("rehearsed", live.rehearse(["/bin/false"]).status)
say("children", children())
"""


@pytest.mark.parametrize("guard", ["fork", "vm"])
def test_a_rehearsed_program_that_stays_is_in_nobodys_way(tmp_path: Path, guard: str) -> None:
    """It cannot be killed, and is reaped when it has ended."""
    result = run(tmp_path, STAYS, guard, PYTHONWARNINGS="error")
    assert result.of("stays") == [[False]], result.stderr
    assert result.of("audit") == [[[["child", True, True]]]]
    assert result.of("exec") == [["execvp /nonexistent failed: No such file or directory"]]
    assert result.of("rehearsed") == [[1]] and result.of("children") == [[[]]]
    assert "Warning" not in result.stderr


LIMITS = """
import resource, socket
mode = sys.argv[1]
live.ready()
pairs = []
for number in range(60):
    pairs.append(socket.socketpair())
    live.keep(f"c:{number}", pairs[-1][0])
NEW = [PYTHON, "-c", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30));"
       "from cpr import live; live.names(); live.ready()"]
if mode == "early":  # in a late update they go over the exec, whatever the limit
    say("new", fails(NEW, mode=mode).reason)
open_fds = len(os.listdir("/proc/self/fd"))
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for limit in range(open_fds - 1, open_fds + 12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    error = fails(["/bin/false"], mode=mode)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == open_fds, limit
    say("old", error.reason)
for first, second in pairs:
    first.send(b"x")
    assert second.recv(1) == b"x"
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
say("end", os.getuid(), fails(["/bin/false"], mode=mode).reason)
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_want_of_descriptors_is_said(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, LIMITS, mode)
    assert "end" in {line[0] for line in result.lines}, result.stderr
    assert mode == "late" or "RLIMIT_NOFILE" in result.of("new")[0][0]
    reasons = [line[0] for line in result.of("old")]
    assert all("Too many open files" in reason or "exit status 1" in reason for reason in reasons)
    assert "Too many open files" in reasons[0] and "exit status 1" in reasons[-1]


EARLY_USE = """
if len(sys.argv) > 1:
    error = fails(["/bin/false"])
    say("starting", error.reason)
live.ready()
if len(sys.argv) == 1:
    live.update([PYTHON, __file__, "new"])
os.environ["CPR_LIVE"] = "no,such,update,early"
say("wrong", os.system(f"{PYTHON} -c 'from cpr import live; live.ready()'") != 0)
"""


def test_a_program_that_is_not_ready_is_not_updated(tmp_path: Path) -> None:
    result = run(tmp_path, EARLY_USE)
    assert "live.ready()" in result.of("starting")[0][0]
    assert result.of("wrong") == [[True]]
    assert "CPR_LIVE='no,such,update,early' names no update" in result.stderr


MEMORY = """
import resource
first = live.memory("first", 4096)
first[:2] = b"hi"
live.ready()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (300 << 20, hard))
try:
    live.memory("big", 1 << 30)
except live.PreserveError as error:
    say("memory", str(error), live.names())
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
def no_process():
    raise OSError(11, "Resource temporarily unavailable")
fork, os.fork = os.fork, no_process
error = fails(["/bin/false"])
os.fork = fork
say("fork", error.reason, error.pid_changed)
say("end", fails(["/bin/false"]).status, bytes(first[:2]).decode(), live.names())
"""


def test_want_of_memory_and_processes_is_said(tmp_path: Path) -> None:
    found = {line[0]: line[1:] for line in run(tmp_path, MEMORY).lines}
    assert "'big'" in found["memory"][0] and "allocate memory" in found["memory"][0]
    assert found["memory"][1] == ["first"]
    assert "no process for the guard: Resource temporarily" in found["fork"][0]
    assert found["fork"][1] is False
    assert found["end"] == [1, "hi", ["first"]]


CHILD = """
mode, step = sys.argv[1:3]
if step == "old":
    memory = live.memory("table", 4096)
    live.ready()
    live.update([PYTHON, __file__, mode, "new"], mode=mode)
child = os.fork()
if child == 0:
    try:
        live.ready()
    except live.UpdateError as error:
        say("child", str(error).replace(str(os.getppid()), "PID"))
    os._exit(0)
os.waitpid(child, 0)
live.memory("table", 4096)
live.ready()
say("parent", True)
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_child_of_the_new_program_takes_nothing_over(tmp_path: Path, mode: str) -> None:
    """As a server that forks its workers too soon: the service would be theirs, and then gone."""
    result = run(tmp_path, CHILD, mode, "old")
    assert result.of("parent") == [[True]], result.stderr
    ((said,),) = result.of("child")
    assert said.startswith("only the new program's own process, PID PID, takes over"), said
