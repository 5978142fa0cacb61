"""Benchmarks that are really run, on small guests; no test here is of how long anything takes."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MISSING, ROOT

from benchmarks.__main__ import main
from benchmarks.observer import Observer

SMALL = ["--ram=64M", "--pages=4K", "--backing=lazy", "--guest=heartbeat"]
SVG = b"<?xml"


@pytest.fixture
def kvm(guests) -> None:
    if reason := MISSING["kvm"]():
        pytest.skip(reason)


class Counter:
    """A 32-bit counter in a memfd, and an observer of it."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("counter")
        os.ftruncate(self._fd, mmap.PAGESIZE)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._map = mmap.mmap(self._fd, mmap.PAGESIZE)

    def set(self, value: int) -> None:
        self._map[64:68] = value.to_bytes(4, "little")

    def count(self, first: int, seconds: float) -> int:
        end, value = time.monotonic() + seconds, first
        while time.monotonic() < end:
            value += 1
            self.set(value)
        return value

    def count_slowly(self, first: int, seconds: float, step: float) -> int:
        """With so many seconds at least from one to the next."""
        value, now = first, time.monotonic()
        end = now + seconds
        while now < end:
            value += 1
            self.set(value)
            next_step = now + step
            while now < next_step:
                now = time.monotonic()
        return value

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


@pytest.fixture
def counter() -> Iterator[Counter]:
    found = Counter()
    yield found
    found.close()


def test_observer_sees_how_long_a_counter_stands_still(counter):
    with Observer(counter.path, 64) as observer:
        value = counter.count(0, 0.05)
        observer.window()
        value = counter.count(value, 0.05)
        begin = time.monotonic_ns()
        time.sleep(0.2)
        end = time.monotonic_ns()
        last = counter.count(value, 0.05)
        window = observer.window()
        assert window.length_ns + window.error_ns >= 200_000_000
        assert window.start_ns < end
        assert window.start_ns + window.length_ns > begin + 200_000_000
        assert (window.before, window.backwards) == (value, 0)
        assert value < window.after <= last
        assert window.polls > 100
        time.sleep(0.05)
        still = observer.window()
        assert still.open_ns >= 50_000_000


@pytest.fixture
def first_cpu() -> Iterator[None]:
    """This process is on that alone: an observer on the last one does not slow it down."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_observer_that_could_not_look_knows_how_far_the_counter_went(counter, first_cpu):
    with Observer(counter.path, 64) as observer:
        value = counter.count_slowly(0, 0.1, 50e-6)  # as fast as it ever is
        observer.rest()
        value = counter.count_slowly(value, 0.3, 150e-6)
        time.sleep(0.1)
        value = counter.count_slowly(value, 0.3, 150e-6)
        observer.look()
        counter.count_slowly(value, 0.02, 150e-6)
        window = observer.window()
        assert window.latest_ns > 700_000_000
        assert 100_000_000 <= window.length_ns < window.latest_ns - 50_000_000


def test_observer_sees_a_counter_go_back(counter):
    counter.set(7)
    with Observer(counter.path, 64) as observer:
        for value in (8, 0xFFFFFFFF, 3, 2, 5):  # back, round, back
            counter.set(value)
            time.sleep(0.02)
        assert observer.window().backwards == 2


def test_observer_that_cannot_start_says_why():
    with pytest.raises(RuntimeError, match=r"observer: /none: No such file"):
        Observer("/none")


def test_run_leaves_json_markdown_and_plots(kvm, tmp_path, capsys):
    modes = "--modes=late,early"
    words = ["--accel=kvm", "--backing=prealloc", modes, "--updates=1", f"--output={tmp_path}"]
    assert main(["run", *SMALL, *words]) == 0
    shown = capsys.readouterr()
    entries = json.loads((tmp_path / "run.json").read_text())["entries"]
    assert [entry["mode"] for entry in entries] == ["late", "early"]
    for entry in entries:
        assert entry["skipped"] == ""
        lists = ("pauses", "baselines", "errors", "populating", "reported")
        assert [len(entry[name]) for name in lists] == [1] * 5
        for pause, phases in zip(entry["pauses"], entry["phases"], strict=True):
            assert {"prepare", "exec", "map", "vcpu", "stop", "load", "resume"} <= set(phases)
            assert ("ready" in phases) == (entry["mode"] == "early")
            assert all(length >= 0 for length in phases.values())
            assert pause > 0
        assert f"kvm 64M 4K prealloc heartbeat {entry['mode']}: median" in shown.err
    text = (tmp_path / "report.md").read_text()
    row = r"^\| kvm \| 64M \| 4K \| prealloc \| heartbeat \| early \|( -?[\d.]+ \|){9} 1 \|"
    assert re.search(row, text, re.M)
    assert text in shown.out
    for name in ("pause-kvm-prealloc.svg", "phases.svg"):
        assert (tmp_path / name).read_bytes().startswith(SVG)
    assert main(["report", "--markdown", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    assert main(["predict", "--ram=1G", f"--results={tmp_path / 'run.json'}"]) == 1
    assert "nothing of that kind was measured" in capsys.readouterr().err


def test_mode_that_the_vmm_refuses_is_left_out(kvm, tmp_path, monkeypatch):
    from benchmarks import machines

    monkeypatch.setitem(machines.PARAMETERS, "late", {"x-cpr-unheard-of": True})
    words = ["--accel=kvm", "--modes=late", "--updates=1", f"--output={tmp_path}"]
    assert main([*SMALL, *words]) == 0
    (entry,) = json.loads((tmp_path / "run.json").read_text())["entries"]
    assert entry["pauses"] == []
    assert entry["skipped"].startswith("the VMM refuses x-cpr-unheard-of: ")
    assert f"left out: {entry['skipped']}" in (tmp_path / "report.md").read_text()


def test_interrupted_run_is_resumed(kvm, tmp_path):
    words = ["--ram=64M,128M", "--pages=4K", "--backing=lazy", "--accel=kvm", "--modes=early"]
    words.append("--guest=heartbeat")
    command = [sys.executable, "-m", "benchmarks", *words, "--updates=1", f"--output={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("kvm 64M"):
                break
        process.send_signal(signal.SIGINT)
        assert "go on with --resume" in process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGINT
    path = tmp_path / "run.json"
    first = json.loads(path.read_text())["entries"]
    assert [entry["ram"] >> 20 for entry in first] == [64]
    run = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    entries = json.loads(path.read_text())["entries"]
    assert entries[0] == first[0]
    assert [entry["ram"] >> 20 for entry in entries] == [64, 128]


def test_brownout_rate_and_save(kvm, tmp_path, monkeypatch, capsys):
    from benchmarks import rate

    monkeypatch.setattr(rate, "UPDATES", 3)
    own = ["--accel=kvm", "--modes=early", "--rounds=1", f"--output={tmp_path}"]
    assert main(["brownout", *SMALL, *own]) == 0
    assert main(["rate", *SMALL, *own]) == 0
    assert main(["save", "--ram=64M", "--accel=kvm", "--rounds=2", f"--output={tmp_path}"]) == 0
    small = ["--memory=8", "--save=8", "--rounds=1", "--save-rounds=1"]
    assert main(["ram-copy", *small, f"--output={tmp_path}"]) == 0

    def entries(kind: str) -> list[dict]:
        found: list[dict] = json.loads((tmp_path / f"{kind}.json").read_text())["entries"]
        assert not any(entry.get("skipped") for entry in found), found
        return found

    (sweep,) = entries("brownout")[0]["rounds"]
    assert sweep["with"] > sweep["pause"] > 0
    assert sweep["without"] > 0
    (rounds,) = entries("rate")[0]["rounds"]
    assert rounds["rate"] > 0
    assert rounds["kept"] > 0
    kinds = ("random", "zero", "untouched")
    assert [(e["kind"], len(e["seconds"])) for e in entries("save")] == [
        (kind, 2) for kind in kinds
    ]
    assert {"memcpy", "write, random"} <= {entry["name"] for entry in entries("ram-copy")}
    text = (tmp_path / "report.md").read_text()
    titles = ("Brown-out", "Updates back to back", "Saving RAM", "Copying RAM")
    assert all(f"## {title}" in text for title in titles)
    assert not list(Path("/dev/shm").glob(f"cpr-benchmark-{os.getpid()}-*"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["predict", "--ram=1G", "--results=/none"], "/none: No such file"),
        (["report", "/none"], "/none: no results"),
        (["--qemu=/none"], "--qemu: cannot run '/none'"),
    ],
)
def test_what_is_wrong_is_named(words, problem, capsys):
    assert main(words) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--ram=big"], ["--pages=3M"], ["--modes=qemu"], ["--quick", "--full"], ["walk"]]
)
def test_wrong_options(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "usage: python -m benchmarks" in capsys.readouterr().err
