"""Huge pages and shmem_enabled are set back, whatever ends the benchmark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import settings
from benchmarks.settings import Settings

POOLS = {"2M": "hugepages-2048kB", "1G": "hugepages-1048576kB"}


class Machine:
    """A folder in the place of /sys and /run."""

    def __init__(self, folder: Path) -> None:
        self.hugepages = folder / "hugepages"
        self.shmem = folder / "shmem_enabled"
        self.journal = folder / "journal"
        for name in POOLS.values():
            (self.hugepages / name).mkdir(parents=True)
            (self.hugepages / name / "nr_hugepages").write_text("3\n")
        self.shmem.write_text("never\n")

    def values(self) -> list[str]:
        paths = [self.hugepages / name / "nr_hugepages" for name in POOLS.values()]
        return [path.read_text().strip() for path in (*paths, self.shmem)]


BEFORE = ["3", "3", "never"]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    found = Machine(tmp_path)
    monkeypatch.setattr(settings, "HUGEPAGES", found.hugepages)
    monkeypatch.setattr(settings, "SHMEM_ENABLED", found.shmem)
    monkeypatch.setattr(settings, "JOURNAL", found.journal)
    return found


def test_settings_are_set_and_given_back(machine):
    with Settings() as changed:
        changed.prepare("2M", [64 << 20, 64 << 20])
        changed.prepare("1G", [1 << 30])
        changed.prepare("THP", [1 << 30])
        changed.prepare("4K", [1 << 30])
        assert machine.values() == ["67", "4", "always"]
        assert json.loads(machine.journal.read_text())["pid"] == os.getpid()
    assert machine.values() == BEFORE
    assert not machine.journal.exists()


def test_settings_are_given_back_after_an_exception(machine):
    with pytest.raises(ZeroDivisionError), Settings() as changed:
        changed.hugepages("2M", 10)
        raise ZeroDivisionError
    assert machine.values() == BEFORE
    assert not machine.journal.exists()


def test_what_the_machine_has_not_is_named(machine, monkeypatch):
    with Settings() as changed:
        (machine.hugepages / POOLS["1G"] / "nr_hugepages").unlink()
        with pytest.raises(RuntimeError, match="this machine has no 1G pages"):
            changed.hugepages("1G", 1)
        machine.shmem.unlink()
        with pytest.raises(RuntimeError, match="no transparent huge pages"):
            changed.transparent_hugepages()
        monkeypatch.setattr(settings, "read", lambda path: "7")  # fewer than were asked for
        with pytest.raises(RuntimeError, match="only 0 of 10 2M pages can be had"):
            changed.hugepages("2M", 10)


SCRIPT = """
import sys, time
from pathlib import Path
from benchmarks import settings
folder = Path(sys.argv[1])
settings.HUGEPAGES = folder / "hugepages"
settings.SHMEM_ENABLED = folder / "shmem_enabled"
settings.JOURNAL = folder / "journal"
try:
    with settings.interruptible(), settings.Settings() as changed:
        changed.hugepages("2M", 5)
        changed.transparent_hugepages()
        print("ready", flush=True)
        time.sleep(60)
except settings.Interrupted as error:
    sys.exit(error.status)
"""


def changing_process(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_settings_are_given_back_after_a_signal(machine, tmp_path, number):
    with changing_process(tmp_path) as process:
        assert machine.values() == ["8", "3", "always"]
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert machine.values() == BEFORE
    assert not machine.journal.exists()


def test_next_run_restores_what_a_killed_one_has_left(machine, tmp_path):
    with changing_process(tmp_path) as process:
        with pytest.raises(RuntimeError, match=f"another benchmark runs, PID {process.pid}"):
            settings.restore_leftovers()
        process.kill()
    assert machine.values() == ["8", "3", "always"]
    warnings = settings.restore_leftovers()
    assert machine.values() == BEFORE
    assert not machine.journal.exists()
    assert sum("a run that was killed" in warning for warning in warnings) == 2
    assert "3 2M pages are reserved already; they stay so" in warnings


def test_signal_while_settings_are_given_back_waits(machine, monkeypatch):
    def interrupted(self, real=Settings._restore_last):
        real(self)
        monkeypatch.setattr(Settings, "_restore_last", real)
        raise settings.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(Settings, "_restore_last", interrupted)
    with pytest.raises(settings.Interrupted), Settings() as changed:
        changed.hugepages("2M", 5)
        changed.transparent_hugepages()
    assert machine.values() == BEFORE
    assert not machine.journal.exists()


def test_choice_in_brackets_is_the_setting(tmp_path):
    path = tmp_path / "shmem_enabled"
    path.write_text("always within_size advise [never] deny force\n")
    assert settings.read(path) == "never"
