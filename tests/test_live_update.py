"""Programs that replace themselves, and go on where the new one does not come up."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

UPDATES = """
mode, guard = sys.argv[1:3]
state = live.state(default={"pids": [], "words": []})
memory = live.memory("table", 4096)
file = live.file("log", lambda: open("log", "w+"))
count = int.from_bytes(memory[:8], "little") + 1
previous = live.predecessor
say("start", live.generation, os.getpid(), count, state, previous and previous.pid)
live.ready()
memory[:8] = count.to_bytes(8, "little")
file.write(f"line {count}\\n")
if live.generation == 3:
    file.seek(0)
    say("end", file.read(), live.names())
    say("children", wait_alone())
    sys.exit()
pids = [*state["pids"], os.getpid()]
live.on_save(lambda: {"pids": pids, "words": ["ü", None, 1.5]})
live.update(mode=mode, guard=guard)
"""


@pytest.mark.parametrize("guard", ["fork", "vm"])
@pytest.mark.parametrize("mode", ["early", "late"])
def test_three_updates_keep_pid_state_memory_and_file(
    tmp_path: Path, mode: str, guard: str
) -> None:
    result = run(tmp_path, UPDATES, mode, guard)
    starts = result.of("start")
    assert [start[0] for start in starts] == [0, 1, 2, 3], result.stderr
    pids = [start[1] for start in starts]
    assert pids == pids[:1] * 4
    assert [start[2] for start in starts] == [1, 2, 3, 4]
    assert starts[3][3] == {"pids": pids[:3], "words": ["ü", None, 1.5]}
    assert [start[4] for start in starts] == [None, *pids[:3]]
    assert result.of("end")[0] == ["".join(f"line {n}\n" for n in (1, 2, 3, 4)), ["log", "table"]]
    assert result.of("children") == [[""]]


FAILURES = """
mode, guard = sys.argv[1:3]
import signal, socket, subprocess
first, second = socket.socketpair()
live.keep("one", first)
memory = live.memory("memory", 4096)
memory[:5] = b"hello"
hits = []
signal.signal(signal.SIGUSR1, lambda *words: hits.append(1))
live.on_save(lambda: "state")
live.ready()

def new(code):
    return [PYTHON, "-c", code]

COMES = "from cpr import live; live.state(); "
CASES = {
    "missing": (["/nonexistent/program"], {}),
    "no program": ([__file__ + ".txt"], {}),
    "not executable": ([__file__], {}),
    "exits": (new("import sys; sys.exit(3)"), {}),
    "import": (new("import no_such_module"), {}),
    "kill": (new("import os; os.kill(os.getpid(), 9)"), {}),
    "hangs": (["/bin/sleep", "50"], {"timeout": 0.3}),
    "loads and dies": (new(COMES + "raise SystemExit(4)"), {}),
    "loads and hangs": (new(COMES + "import time; time.sleep(50)"), {"timeout": 1}),
}
open(__file__ + ".txt", "w").write("nothing\\n")
os.chmod(__file__ + ".txt", 0o755)

def counts():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

before = counts()
for name, (argv, options) in CASES.items():
    pid = os.getpid()
    error = fails(argv, mode=mode, guard=guard, **options)
    assert error.pid_changed == (os.getpid() != pid)
    say(name, error.reason, error.status, error.signal, error.pid_changed, error.stderr)
    os.kill(os.getpid(), signal.SIGUSR1)
    second.send(b"x")
    assert first.recv(1) == b"x" and memory[:5] == b"hello" and hits.pop() == 1
    assert subprocess.run(["/bin/true"]).returncode == 0
    assert live.names() == ["memory", "one"] and live.get("one") is first
    assert counts() == before, (name, counts(), before)
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        assert not children.read()
say("end")
"""


@pytest.mark.parametrize("guard", ["fork", "vm"])
@pytest.mark.parametrize("mode", ["early", "late"])
def test_failing_updates_return_with_everything(tmp_path: Path, mode: str, guard: str) -> None:
    result = run(tmp_path, FAILURES, mode, guard)
    found = {line[0]: line[1:] for line in result.lines}
    assert "end" in found, result.stderr
    for name, text in (
        ("missing", "No such file"),
        ("no program", "Exec format error"),
        ("not executable", "Permission denied"),
    ):
        assert text in found[name][0]
        assert found[name][1:] == [None, None, False, []]
    assert found["exits"][1:] == [3, None, True, []]
    assert found["import"][1:4] == [1, None, True]
    assert found["import"][4][-1] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert "no_such_module" in result.stderr
    assert found["kill"][1:] == [None, 9, True, []]
    assert found["loads and dies"][1:4] == [4, None, True]
    for name in ("hangs", "loads and hangs"):
        assert "did not take over within" in found[name][0]
        assert found[name][1:4] == [None, None, True]
