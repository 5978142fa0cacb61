"""Two releases, each installed by pip in a folder of its own, update into each other and back."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from waiting import wait_for_change

HEARTBEAT = 0x8000
SOURCES = ("cpr", "setup.py", "pyproject.toml", "README.md")
NEXT = "0.2.0"


def copy_project(folder: Path, version: str | None) -> None:
    """The project's sources; with another `version`, if one is given."""
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "_cpr.c", "_tcg.c")
            shutil.copytree(source, folder / name, ignore=skip)
        else:
            shutil.copy(source, folder)
    for name in ("pyproject.toml", "cpr/constants.py"):
        if version is not None:
            path = folder / name
            text, count = re.subn(r'(?im)^(version = )".*?"', rf'\1"{version}"', path.read_text())
            assert count == 1
            path.write_text(text)


def install(source: Path, target: Path) -> None:
    words = ["pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-warn-conflicts"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> list[Path]:
    """The folders in which this release and the next are installed."""
    folder = tmp_path_factory.mktemp("releases")
    copy_project(folder / "old", None)
    install(folder / "old", folder / "this")
    copy_project(folder / "new", NEXT)
    shutil.copytree(folder / "old" / "build", folder / "new" / "build")  # the C is the same
    install(folder / "new", folder / "next")
    return [folder / "this", folder / "next"]


def test_releases_update_into_each_other(start, accel, releases):
    commands = [[sys.executable, "-I", "-S", f"{path}/cpr/vmm/__main__.py"] for path in releases]
    words = [
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "16M"),
        *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
    ]
    vm = start(*words, command=[*commands[0], "run"])
    arguments, versions = vm.words[len(commands[0]) :], []
    for command in (commands[1], commands[0]):
        told = vm.ask("cpr-exec", command=[*command, *arguments], test=True)
        assert told["refusals"] == [] and told["start-time"] >= 0
        counted = vm.u32(HEARTBEAT)
        vm.update(command=[*command, *arguments])
        assert vm.ask("query-migrate")["status"] == "completed"
        assert vm.ask("query-migrate")["x-cpr-update"] == "early"
        versions.append(vm.ask("query-version")["package"])
        assert wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on") > counted
    assert vm.pid == vm.process.pid
    assert versions[0] == f"cpr-vmm {NEXT}" != versions[1]
