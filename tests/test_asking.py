"""Programs that are asked what they know: who is refused, and who is taken for another's."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from failing import start_vm
from harness.qmp import QmpError
from test_device_updates import Source
from test_silent_peers import hanging

from cpr.live.program_files import ProgramFiles
from cpr.migration import program

UNASKED = "the new program could not be asked what it knows: it "
REMEDY = ". Try again; a command without the word 'run', as that of a script, is not asked"


@pytest.fixture(autouse=True)
def own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cpr.vmm", "run"])


def refusal_of(command: list[str], guests: Path) -> str:
    """What a VM of this process refuses this command for."""
    source = Source(str(guests / "heartbeat.img"))
    (refusal,) = source.migration.check_cpr_exec(command).refusals
    source.close()
    return refusal


@pytest.mark.parametrize("text", ["kill -9 $$", "sh -c 'kill -9 $$'; exit $?"], ids=["it", "its"])
def test_one_that_is_killed_is_refused_before_anything_stops(start, accel, text):
    """It may know the protocol: in QEMU's way it would be believed to have the guest."""
    refusal = f"{UNASKED}was ended by signal 9{REMEDY}"
    vm = start_vm(start, accel)
    killed = ["/bin/sh", "-c", text, "run"]
    assert refusal in vm.qmp.command("cpr-exec", test=True, command=killed)["refusals"][0]
    with pytest.raises(QmpError, match=re.escape(refusal)):
        vm.qmp.command("cpr-exec", command=killed)
    assert vm.qmp.command("query-migrate") == {}
    assert not vm.qmp.events
    vm.update(command=vm.words)


def test_one_that_does_not_answer_is_refused(monkeypatch, guests, tmp_path):
    monkeypatch.setattr(program, "ANSWER_TIMEOUT", 0.1)
    refusal = refusal_of(hanging(tmp_path, False), guests)
    assert refusal.startswith(f"{UNASKED}has not answered within ")
    assert REMEDY in refusal


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_one_that_cannot_be_started_now_is_refused(monkeypatch, guests, number):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    refusal = refusal_of(["/bin/true", "run"], guests)
    assert refusal.startswith(f"{UNASKED}could not be started: {os.strerror(number)}{REMEDY}")


@pytest.mark.parametrize("content", [None, "#!/nonexistent/interpreter\n", "no program"])
def test_what_is_no_program_knows_nothing(tmp_path, content):
    """The exec says what is wrong with it."""
    path = tmp_path / "program"
    if content is not None:
        path.write_text(content)
        path.chmod(0o755)
    assert program.spoken_versions([str(path), "run"], ProgramFiles(), str) == []


@pytest.mark.parametrize("text", ["echo 1; exit 1", "echo it is another", "exit 2"])
def test_one_that_ends_without_an_answer_knows_nothing(text):
    command = ["/bin/sh", "-c", text, "run"]
    assert program.spoken_versions(command, ProgramFiles(), str) == []
