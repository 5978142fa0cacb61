"""A device over updates with overlap: the guest drives it during the whole exec."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from waiting import wait_for

from .edu import MEMORY_AND_MASTER
from .guest import check_adapter, check_running, device_words, own_words, running, stopped_new_image
from .machine import E1000E, EDU, command

KINDS = ["type1", pytest.param("iommufd", marks=pytest.mark.iommufd)]
OVERLAP = ("-global", "migration.x-cpr-exec-overlap=on")
UPDATES = 20


@pytest.fixture
def edu(kind: str):
    """The edu guest, whose updates have overlap."""
    with running("edu", *device_words(kind, EDU), *OVERLAP) as guest:
        guest.wait("rounds", 1)
        yield guest


@pytest.mark.parametrize("kind", KINDS)
def test_device_works_on_before_there_is_a_new_vmm(kind: str) -> None:
    """A round has DMA and interrupts, and ends at an access to configuration space."""
    with running("edu", *device_words(kind, EDU), *OVERLAP) as guest:
        guest.hold()
        with stopped_new_image(guest.vm) as finish:
            before = guest["interrupts"]
            guest.go_on()
            guest.wait("interrupts", before + 1)
            rounds = guest["rounds"]
            finish()
        guest.wait("rounds", rounds + 1)
        check_running(guest)
    with running("e1000e", *device_words(kind, E1000E), *OVERLAP) as guest:
        guest.hold()
        with stopped_new_image(guest.vm) as finish:
            before = guest["interrupts"]
            guest.go_on()
            guest.wait("interrupts", before + 3)
            finish()
        check_adapter(guest, 0)
        assert guest.vm.stderr == ""


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_updates_lose_no_interrupt_and_double_none(edu, kind: str) -> None:
    enabled = command(EDU)
    assert enabled & MEMORY_AND_MASTER == MEMORY_AND_MASTER
    for _ in range(UPDATES):
        edu.vm.update()
    check_running(edu)
    assert command(EDU) == enabled
    assert edu.vm.stderr == ""


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_an_adapter(kind: str) -> None:
    with running("e1000e", *device_words(kind, E1000E), *OVERLAP) as guest:
        check_adapter(guest, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_exec_that_fails_leaves_the_device_at_work(edu, kind: str) -> None:
    for _ in range(3):
        edu.vm.qmp.command("cpr-exec", command=["/nonexistent/vmm", "x"])
        wait_for(lambda: edu.vm.qmp.command("query-migrate")["status"] == "failed", "it fails")
        check_running(edu)
    edu.vm.update()
    check_running(edu)


@pytest.mark.parametrize("kind", KINDS)
def test_new_vmm_that_refuses_goes_back_with_the_device(edu, kind: str) -> None:
    words = [*own_words(edu.vm), "-incoming", f"file:{edu.vm.directory}/stream", "-m", "32M"]
    edu.vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=words)
    edu.vm.qmp.send("migrate", uri=f"file:{edu.vm.directory}/stream")
    edu.vm.reconnect()
    assert "the update failed" in edu.vm.stderr
    check_running(edu)
    edu.vm.update()
    check_running(edu)


@pytest.mark.parametrize("kind", KINDS)
def test_new_image_that_is_killed_leaves_the_device_to_the_old_vmm(edu, kind: str) -> None:
    gate = Path(f"{edu.vm.directory}/gate")
    wait = f"while ! [ -e {shlex.quote(str(gate))} ]; do sleep 0.1; done"
    edu.vm.qmp.command(
        "migrate-set-parameters", mode="cpr-exec", cpr_exec_command=["/bin/sh", "-c", wait]
    )
    edu.vm.qmp.send("migrate", uri=f"file:{edu.vm.directory}/stream")
    edu.vm.qmp.wait_closed()
    os.kill(edu.vm.pid, signal.SIGKILL)
    edu.vm.process.wait()
    wait_for(lambda: "the update failed" in edu.vm.stderr, "the old VMM has the guest", 60)
    pid = int(edu.vm.stderr.rpartition("PID ")[2].split()[0])
    try:
        check_running(edu)
    finally:
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.1)
