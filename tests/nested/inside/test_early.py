"""A device over early updates: the guest drives it during all of them, and after failed ones."""

from __future__ import annotations

import pytest
from waiting import wait_for

from .edu import MEMORY_AND_MASTER
from .guest import KINDS, check_adapter, check_running, device_words, locked, own_words, running
from .guest import update_by_migrate as migrate
from .machine import E1000E, EDU, INTX_DISABLE, NVME, command
from .new_images import (
    FAILURES,
    TIMEOUT_MS,
    failing,
    plain_words,
    update,
    wait_for_failure,
    waiting_new_image,
)
from .nvme import ENABLED, READY

UPDATES = 20


@pytest.fixture
def edu(kind: str):
    with running("edu", *device_words(kind, EDU)) as guest:
        guest.wait("rounds", 1)
        yield guest


@pytest.mark.parametrize("kind", KINDS)
def test_device_works_on_before_there_is_a_new_vmm(edu, kind: str) -> None:
    """A round has DMA and interrupts, and ends at an access to configuration space."""
    before = locked(edu.vm.pid)
    with waiting_new_image(edu.vm) as finish:
        assert locked(edu.vm.pid) == 0, "the new program has nothing yet"
        edu.wait("rounds", edu["rounds"] + 3)
        finish()
    check_running(edu)
    assert locked(edu.vm.pid) == before
    assert edu.vm.complaints == ""


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_an_adapter_come_before_there_is_a_new_vmm(kind: str) -> None:
    with running("e1000e", *device_words(kind, E1000E)) as guest:
        with waiting_new_image(guest.vm) as finish:
            guest.wait("interrupts", guest["interrupts"] + 9)
            finish()
        check_adapter(guest, 5)
        assert guest.vm.complaints == ""


@pytest.mark.parametrize("kind", KINDS)
def test_lines_come_before_there_is_a_new_vmm(kind: str) -> None:
    with running("intx", *device_words(kind, EDU)) as guest:
        for _ in range(3):
            with waiting_new_image(guest.vm) as finish:
                guest.wait("rounds", guest["rounds"] + 20)
                finish()
        guest.wait("rounds", guest["rounds"] + 20)
        guest.hold()
        found = guest.all()
        assert found["interrupts"] == found["triggered"], found


@pytest.mark.parametrize("kind", KINDS)
def test_controller_is_not_reset(kind: str) -> None:
    """Its queues go on in the guard, and in the new VMM."""
    with running("nvme", *device_words(kind, NVME)) as guest:
        enabled = command(NVME) & ~INTX_DISABLE

        def identify(number: int) -> None:
            guest["request"] = number
            guest.wait("done", number)
            found = guest.all()
            assert (found["status"], found["slot"]) == (0, (number - 1) % 4), found
            assert (found["cc"], found["csts"]) == (ENABLED, READY), found
            assert command(NVME) & ~INTX_DISABLE == enabled

        identify(1)
        with waiting_new_image(guest.vm) as finish:
            identify(2)
            finish()
        identify(3)
        update(guest.vm, "early", failing(guest.vm, "dies-loaded"))
        wait_for_failure(guest.vm, 1)
        identify(4)
        update(guest.vm, "early", failing(guest.vm, "refuses-loaded"))
        wait_for_failure(guest.vm, 2)
        identify(5)
        guest.vm.update()
        identify(6)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_updates_early_and_late_lose_no_interrupt(edu, kind: str) -> None:
    enabled = command(EDU)
    assert enabled & MEMORY_AND_MASTER == MEMORY_AND_MASTER
    for number in range(UPDATES):
        edu.wait_while("dma_busy", 0)
        if number % 2:
            stream = f"{edu.vm.directory}/stream"
            words = own_words(edu.vm)
            program = words[: words.index("run") + 1]
            migrate(edu.vm, [*program, *plain_words(edu.vm), "-incoming", f"file:{stream}"], stream)
        else:
            edu.vm.update()
    check_running(edu)
    assert command(EDU) == enabled
    assert edu.vm.complaints == ""


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("way", ["early", "late"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_image_that_fails_leaves_the_device_at_work(
    edu, kind: str, way: str, how: str
) -> None:
    enabled, before = command(EDU), locked(edu.vm.pid)
    if how.startswith("hangs"):
        edu.vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=TIMEOUT_MS)
    edu.wait_while("dma_busy", 0)
    pid = edu.vm.pid
    update(edu.vm, way, failing(edu.vm, how))
    wait_for_failure(edu.vm, 1)
    assert (edu.vm.pid == pid) == how.startswith("refuses")
    check_running(edu)
    assert command(EDU) == enabled
    assert locked(edu.vm.pid) == before
    edu.vm.update()
    check_running(edu)
    assert locked(edu.vm.pid) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_exec_that_fails_leaves_the_device_at_work(edu, kind: str) -> None:
    for _ in range(3):
        edu.vm.qmp.command("cpr-exec", command=["/nonexistent/vmm", "run"])
        wait_for(lambda: edu.vm.qmp.command("query-migrate")["status"] == "failed", "it fails")
        check_running(edu)
    edu.vm.update()
    check_running(edu)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_does_not_touch_the_device(edu, kind: str) -> None:
    for _ in range(3):
        found = edu.vm.qmp.command("cpr-exec", test=True)
        assert found["refusals"] == [], found
        assert found["start-time"] > 0
        check_running(edu)
    edu.vm.update()
    check_running(edu)
