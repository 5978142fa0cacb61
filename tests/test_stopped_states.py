"""Guests that stand still for a reason of their own, and what stops, resets and updates do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import missing_kvm
from failing import HEARTBEAT, bad, words
from harness.qmp import QmpError
from harness.vm import ROOT, Vm
from test_survives_suspend import GUEST
from updating import MEMFD, Journey, cpr_transfer
from waiting import wait_for, wait_for_change

AWAKE = bytes.fromhex("66ff060080ebf9")  # 1: incl 0x8000; jmp 1b


def state(vm: Vm) -> str:
    return str(vm.ask("query-status")["status"])


def without_image(start, accel, folder: Path) -> tuple[Vm, Path]:
    """A guest that counts, and where its boot image was: it cannot be reset."""
    image = folder / "boot.img"
    shutil.copy("examples/build/timer.img", image)
    options = " ".join(words(accel, cpus=1)).replace("examples/build/timer.img", str(image))
    vm: Vm = start(*options.split())
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    image.unlink()
    return vm, image


def test_a_migration_that_fails_leaves_an_internal_error_as_it_is(start, accel, tmp_path):
    vm, image = without_image(start, accel, tmp_path)
    vm.ask("system_reset")
    wait_for(lambda: state(vm) == "internal-error", "it cannot be reset")
    vm.ask("migrate", uri="exec:false")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "failed", "the migration has failed")
    assert state(vm) == "internal-error"
    with pytest.raises(QmpError, match="Resetting the Virtual Machine is required"):
        vm.ask("cont")
    shutil.copy("examples/build/timer.img", image)
    vm.ask("system_reset")
    vm.ask("cont")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts again")


def test_a_reset_that_fails_when_the_guest_is_stopped(start, accel, tmp_path):
    """It does not go on where it was."""
    vm, _ = without_image(start, accel, tmp_path)
    *_, status = at_once(
        vm, *({"execute": name} for name in ("system_reset", "stop", "query-status"))
    )
    assert status["return"]["status"] == "internal-error"
    with pytest.raises(QmpError, match="Resetting the Virtual Machine is required"):
        vm.ask("cont")


def test_a_reset_that_fails_for_no_known_reason_can_be_done_again(start, accel):
    """MemoryError, say: the VM stops, and does not stand still as one that runs."""
    command = [sys.executable, str(ROOT / "tests" / "patched_vmm.py"), "reset", "run"]
    vm: Vm = start(*words(accel, cpus=1), command=command)
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    vm.ask("system_reset")
    wait_for(lambda: state(vm) == "internal-error", "it cannot be reset")
    vm.ask("system_reset")
    vm.ask("cont")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts again")


def sleeper(start, accel, tmp_path) -> Vm:
    """One that has slept and is stopped; from its next reset on it counts at 0x8000."""
    image = tmp_path / "sleeper.img"
    image.write_bytes(GUEST.ljust(510, b"\0") + b"\x55\xaa")
    options = " ".join(words(accel, cpus=1)).replace("examples/build/timer.img", str(image))
    vm: Vm = start(*options.split())
    wait_for(lambda: state(vm) == "suspended", "the guest sleeps")
    vm.ask("stop")
    image.write_bytes(AWAKE.ljust(510, b"\0") + b"\x55\xaa")
    return vm


def at_once(vm: Vm, *commands: dict) -> list[dict]:
    """The replies to commands that come in one packet."""
    vm.qmp.send_raw(b"".join(json.dumps(command).encode() + b"\n" for command in commands))
    return [vm.qmp.read_reply() for _ in commands]


def test_a_guest_that_slept_and_is_reset_boots(start, accel, tmp_path):
    vm = sleeper(start, accel, tmp_path)
    commands = ("system_reset", "cont", "query-status")
    *_, status = at_once(vm, *({"execute": name} for name in commands))
    assert status["return"]["status"] == "running"
    wait_for_change(lambda: vm.u32(0x8000), "it has booted")


def test_a_reset_that_is_due_is_done_before_a_migration(start, accel, tmp_path):
    vm = sleeper(start, accel, tmp_path)
    migrate = {"execute": "migrate", "arguments": {"uri": f"file:{tmp_path}/state"}}
    at_once(vm, {"execute": "system_reset"}, migrate)
    wait_for(lambda: vm.ask("query-migrate")["status"] == "completed", "it is saved")
    assert vm.u32(0x7C00) == int.from_bytes(AWAKE[:4], "little")
    vm.ask("cont")
    wait_for_change(lambda: vm.u32(0x8000), "it has booted")


@pytest.mark.skipif(missing_kvm() is not None, reason=str(missing_kvm()))
def test_a_transferred_guest_that_is_updated_stays_one(start, tmp_path):
    """The source must not run it, whichever process of the target has it by now."""
    journey = Journey(start, tmp_path, "examples/build/timer.img", MEMFD, [])
    source = journey.vm
    cpr_transfer(journey)
    target = journey.vm
    journey.wait_running()
    for setting in ("on", "off"):
        target.ask("migrate-set-parameters", x_cpr_exec_overlap=setting)
        target.update()
        with pytest.raises(QmpError, match='Failed to get "write" lock'):
            source.ask("cont")
    target.qmp.command("cpr-exec", command=bad("exit"))
    wait_for(lambda: target.ask("query-migrate")["status"] == "failed", "the update has failed")
    with pytest.raises(QmpError, match='Failed to get "write" lock'):
        source.ask("cont")


def test_a_source_whose_disk_another_vmm_has_stays_stopped(start, tmp_path):
    disk, peer = tmp_path / "disk", f"unix:{tmp_path}/peer"
    disk.write_bytes(bytes(1 << 20))
    options = [*words("tcg", cpus=1), "-drive", f"file={disk},format=raw,if=virtio"]
    source: Vm = start(*options)
    target: Vm = start(*options, "-incoming", peer)
    source.ask("migrate", uri=peer)
    wait_for(lambda: state(target) == "running", "the target has the guest")
    wait_for(lambda: state(source) == "postmigrate", "the source has not")
    with pytest.raises(QmpError, match="lock"):
        source.ask("cont")
    assert state(source) == "postmigrate"
    target.close()
    source.ask("cont")
    wait_for_change(lambda: source.u32(HEARTBEAT), "the guest goes on there")
