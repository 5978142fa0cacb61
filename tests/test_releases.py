"""What every release's updates carry can be loaded by this one, and the guest goes on in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from harness.vm import Vm
from releases.loading import HandOver, LateUpdate, content
from waiting import wait_for_change

from cpr.constants import VERSION
from cpr.state.cpr_state import CprState

HEARTBEAT = 0x8000
FOLDERS = sorted((ROOT / "tests" / "data" / "releases").glob("*/*/"))
FOREIGN = "CPUID"  # in the refusal of a host whose processor is not the one it was written on


def machine(folder: Path) -> dict[str, list[str]]:
    words: dict[str, list[str]] = json.loads((folder.parent / "machine.json").read_text())
    return words


@pytest.fixture(params=FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def folder(request, usable) -> Path:
    from conftest import MISSING

    path: Path = request.param
    if reason := MISSING[path.name]():
        pytest.skip(reason)
    return path


def load(start: Any, folder: Path, words: list[str], **options: Any) -> Vm:
    try:
        vm: Vm = start(*words, "-accel", folder.name, **options)
    except RuntimeError as error:
        if FOREIGN in str(error) and folder.name == "kvm":
            pytest.skip(str(error))
        raise
    return vm


def check_runs(vm: Vm, counted: int) -> None:
    """The guest has what it had counted, and counts on."""
    assert vm.ask("query-status") == {"status": "running", "running": True}
    now = wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
    assert 0 < (now - counted) & 0xFFFFFFFF < 1 << 31
    assert "Traceback" not in vm.stderr


def counter(ram: bytes) -> int:
    return int.from_bytes(ram[HEARTBEAT : HEARTBEAT + 4], "little")


def test_this_release_is_kept():
    assert f"{VERSION}" in {path.parent.name for path in FOLDERS}, "make release-data writes it"
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_cpr_state(path):
    data = (path / "late.cprstate").read_bytes()
    state = CprState.decode(data)
    assert [name for name, _, _ in state.fds] == ["ram0", "pc.bios", "pc.rom"]
    assert state.encode() == data


def test_late_update(start, folder, tmp_path):
    stream = tmp_path / "stream"
    stream.write_bytes(content(folder / "late.vmstate.gz"))
    update = LateUpdate(folder)
    words = [*machine(folder)["shared"], "-incoming", f"file:{stream}"]
    try:
        vm = load(start, folder, words, env=update.environment, pass_fds=update.fds)
    finally:
        update.close()
    check_runs(vm, counter(content(folder / "late.ram0.0.gz")))


def test_early_update(start, folder):
    hand_over = HandOver(folder)
    try:
        vm = hand_over.start(start, *machine(folder)["shared"], "-accel", folder.name)
    except AssertionError as error:
        if FOREIGN in str(error) and folder.name == "kvm":
            pytest.skip(str(error))
        raise
    assert hand_over.program == f"cpr-vmm {VERSION}"
    check_runs(vm, counter(hand_over.ram))


@pytest.mark.parametrize("name", ["reboot", "mapped"])
def test_stream(start, folder, tmp_path, name):
    stream = tmp_path / "stream"
    stream.write_bytes(content(folder / f"{name}.vmstate.gz"))
    words = [*machine(folder)["private"], "-incoming", "defer"]
    vm = load(start, folder, words)
    mapped = {"capability": "mapped-ram", "state": name == "mapped"}
    vm.ask("migrate-set-capabilities", capabilities=[mapped])
    vm.ask("migrate-incoming", uri=f"file:{stream}", exit_on_error=False)
    wait_for_change(lambda: count(vm), "the guest counts on", 2)


def count(vm: Vm) -> int:
    return int(vm.qmp.hmp(f"xp /1xw {HEARTBEAT}").split()[1], 16)
