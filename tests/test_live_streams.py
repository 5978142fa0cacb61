"""The standard streams: what is buffered is not lost, and none is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

BUFFERED = """
mode = sys.argv[1]
@live.on_resume
def serve():
    print('["served"]')
live.on_save(lambda: print('["saved"]'))
live.ready()
live.update([PYTHON, "-c", "from cpr import live; live.ready()"], mode=mode)
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_what_the_old_program_prints_is_not_lost(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, BUFFERED, mode, PYTHONUNBUFFERED="")
    assert result.lines == [["served"], ["saved"]][mode == "late" :], result.stderr


MISSING = """
what = sys.argv[1]
if live.generation:
    out = live.get("out")
    live.ready()
    os.write(out, b'["new"]\\n')
    raise SystemExit
out = os.dup(1)
live.keep("out", out)
live.ready()
if what.isdigit():
    for number in map(int, what):
        os.close(number)
if what == "closed":
    sys.stdout.close()
    sys.stderr = None
if what == "pipe":
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
    print("to nobody")
verdict = live.rehearse()
error = fails(["/bin/false"])
os.write(out, json.dumps(["old", verdict.ok, verdict.reason, error.status]).encode() + b"\\n")
live.update(mode=sys.argv[2], guard=sys.argv[3])
"""


@pytest.mark.parametrize(
    ("what", "mode", "guard"),
    [
        ("012", "early", "fork"),
        ("02", "late", "vm"),
        ("closed", "early", "fork"),
        ("pipe", "early", "vm"),
    ],
)
def test_closed_and_broken_streams(tmp_path: Path, what: str, mode: str, guard: str) -> None:
    result = run(tmp_path, MISSING, what, mode, guard, PYTHONUNBUFFERED="")
    assert result.lines == [["old", True, "", 1], ["new"]], result.stderr
