"""What a new program changes, and then fails, is as it was."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from live_programs import run

CHANGES = """
import socket
mode = sys.argv[1]
size = 8192 if len(sys.argv) > 2 else 4096
memory = live.memory("memory", size, grow=True)
ours, theirs = socket.socketpair()
sock = live.socket("socket", lambda: ours)
file = live.file("file", lambda: open(__file__))
if size == 8192:
    assert memory[5000] == 0, "what a failed program had grown comes back with its bytes"
    memory[5000] = 5
    sock.setblocking(False)
    file.readline()
    if sys.argv[2] == "back":
        live.state(version=0)
    if sys.argv[2] == "dies":
        raise SystemExit(3)
    live.ready()
    say("end", len(memory), memory[0])
    raise SystemExit
live.on_save(lambda: "state")
if live.generation:  # the old command again, which has the PID back
    say("back", len(memory), os.get_blocking(sock.fileno()), file.readline())
    live.ready()
    live.update([PYTHON, __file__, mode, "good"], mode=mode)
memory[0] = 1
live.ready()
file.readline()
for what in ("rehearse", "dies"):
    NEW = [PYTHON, __file__, mode, what]
    say(what, bool(live.rehearse(NEW)) if what == "rehearse" else fails(NEW, mode=mode).status)
    entry = live.image.current().registry.find("memory")
    say("size", entry.size, os.fstat(entry.fd).st_blocks * 512)
    say("blocking", os.get_blocking(sock.fileno()))
say("line", file.readline())
live.update([PYTHON, __file__, mode, "back"], mode=mode, back=True)
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_what_a_failed_program_has_changed_is_undone(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, CHANGES, mode)
    assert result.of("rehearse") == [[True]] and result.of("dies") == [[3]], result.stderr
    assert result.of("size") == [[4096, 4096]] * 2 and result.of("blocking") == [[True]] * 2
    assert result.of("line") == [["import json, os, sys, time\n"]]
    assert result.of("back") == [[4096, True, "from cpr import live\n"]]
    assert result.of("end") == [[8192, 1]]


SHRINKS = """
memory = live.memory("memory", 1 << 16)
if len(sys.argv) > 2:
    try:
        memory.resize(4096)
    except OSError as error:
        say("resize", error.errno)
    raise SystemExit(3)
memory[50000] = 7
live.ready()
NEW = [PYTHON, __file__, sys.argv[1], "new"]
say("rehearse", live.rehearse(NEW).status)
say("update", fails(NEW, mode=sys.argv[1]).status)
say("memory", len(memory), memory[50000])
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_new_program_makes_no_memory_smaller(tmp_path: Path, mode: str) -> None:
    """The previous one would be ended by SIGBUS."""
    result = run(tmp_path, SHRINKS, mode)
    assert result.of("rehearse") == [[3]] and result.of("update") == [[3]], result.stderr
    assert result.of("memory") == [[1 << 16, 7]] and result.of("resize") == [[errno.EPERM]]


UNALIGNED = """
from cpr.live import memfd
if live.generation or len(sys.argv) > 2:
    memory = live.memory("memory", 20000, grow=True)
    if len(sys.argv) > 2:
        memory[5000:] = b"x" * 15000
        os.set_blocking(live.get("after"), False)
        raise SystemExit(3)
    say("new", bytes(memory[:5000]) == b"y" * 5000, memory[5000:] == bytes(15000))
    live.ready()
    raise SystemExit
mode = sys.argv[1]
memory = live.memory("memory", 5000)
memory[:] = b"y" * 5000
path = os.open("/", os.O_PATH)
live.keep("path", path)
after, other = os.pipe()
live.keep("after", after)
if mode == "unmapped":
    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")
    memfd.give_back, mode = refuse, "late"
live.on_resume(lambda: say("resumed"))
live.ready()
say("old", fails([PYTHON, __file__, mode, "new"], mode=mode).reason)
say("after", os.get_blocking(after))
if sys.argv[1] != "unmapped":
    live.update(mode=mode)
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_memory_that_is_no_whole_page_is_what_it_was(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, UNALIGNED, mode)
    ((reason,),) = result.of("old")
    assert reason == "the new program has ended with exit status 3 before it took over"
    assert result.of("after") == [[True]] and result.of("new") == [[True, True]], result.stderr


def test_what_cannot_be_undone_is_said_and_all_else_is(tmp_path: Path) -> None:
    result = run(tmp_path, UNALIGNED, "unmapped")
    ((reason,),) = result.of("old")
    assert reason.endswith("'memory' is not as it was: Cannot allocate memory"), result.stderr
    assert result.of("after") == [[True]] and result.of("resumed") == [[]]
