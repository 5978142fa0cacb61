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


@pytest.mark.parametrize("kind", ["pipe", "1", "2"])
def test_a_new_program_with_a_stderr_of_its_own(tmp_path: Path, kind: str) -> None:
    result = run(tmp_path, REDIRECTED, kind)
    assert result.lines == [["ready", True]], result.stderr
    if kind != "pipe":
        assert (tmp_path / "log").read_text() == "logged"
