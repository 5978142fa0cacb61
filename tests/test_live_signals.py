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
