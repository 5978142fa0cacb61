"""A guest that drives a real PCI device, over updates of this VMM."""

from __future__ import annotations

import mmap
import os

import pytest

from cpr.uapi import iommufd, vfio

from .across_exec import address_of
from .conftest import User
from .edu import IRQ_RAISE, MEMORY_AND_MASTER, OUTSIDE_INTERRUPT, Edu
from .guest import (
    DEVICE,
    KINDS,
    captured_update,
    check_adapter,
    check_running,
    device_words,
    locked,
    running,
    stopped_new_image,
)
from .machine import E1000E, EDU, INTX_DISABLE, NVME, command
from .nvme import ENABLED, READY
from .stolen import descriptor

UPDATES = 20
SPARE = 0x400000  # guest RAM that edu's guest leaves alone
NEW = 0x8000000  # after the guest's RAM
NEW_SIZE = 2 << 20
RAM_KIB = 64 << 10


@pytest.fixture
def edu(kind: str, user: User):
    """The edu guest, run by root or by a user, over type1 or iommufd."""
    with running("edu", *device_words(kind, EDU), command=user.vmm(kind)) as guest:
        guest.wait("rounds", 1)
        yield guest


@pytest.mark.nested_smoke
@pytest.mark.parametrize("kind", KINDS)
def test_dma_and_interrupts_go_on(edu, kind: str) -> None:
    enabled = command(EDU)
    assert enabled & MEMORY_AND_MASTER == MEMORY_AND_MASTER
    seen = edu["command"]
    for _ in range(3):
        before = edu["rounds"]
        edu.vm.update()
        edu.wait("rounds", before + 2)
    check_running(edu)
    assert command(EDU) == enabled
    assert edu["command"] == seen
    assert edu.vm.complaints == ""


@pytest.mark.parametrize("user", ["root"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_updates_lose_no_interrupt_and_double_none(edu, kind: str) -> None:
    in_flight = 0
    for _ in range(UPDATES):
        edu.wait_while("dma_busy", 0)
        in_flight += edu["triggered"] != edu["interrupts"]
        edu.vm.update()
    check_running(edu)
    assert in_flight > UPDATES // 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_works_while_nobody_maps_the_guest(edu, kind: str) -> None:
    """Between the two images: DMA lands in RAM and an interrupt waits to be delivered."""
    edu.hold()
    edu.vm.ram[SPARE : SPARE + 2048] = bytes(2048)
    before = locked(edu.vm.pid)
    with stopped_new_image(edu.vm) as finish:
        between = locked(edu.vm.pid)
        with descriptor(edu.vm, DEVICE[kind]) as fd:
            device = Edu(fd)
            expected = bytes(edu.vm.ram[0x302000 : 0x302000 + 2048])  # still in the buffer
            device.fetch(SPARE)
            assert edu.vm.ram[SPARE : SPARE + 2048] == expected
            device.write(IRQ_RAISE, OUTSIDE_INTERRUPT)
            device.close()
        finish()
    assert edu.vm.ram[SPARE : SPARE + 2048] == expected
    edu.wait("interrupts", edu["triggered"] + 1)
    assert edu["causes"] & OUTSIDE_INTERRUPT
    edu["triggered"] += 1
    edu.go_on()
    check_running(edu)
    if kind == "type1":
        assert before >= RAM_KIB
        assert between == 0
        assert locked(edu.vm.pid) == before


@pytest.mark.parametrize("kind", KINDS)
def test_new_memory_can_be_mapped_after_an_update(edu, kind: str) -> None:
    state = captured_update(edu.vm, str(edu.vm.directory))
    edu.wait("rounds", edu["rounds"] + 1)
    edu.hold()
    file = os.memfd_create("more")
    os.ftruncate(file, NEW_SIZE)
    more = mmap.mmap(file, NEW_SIZE)
    pattern = {"type1": r"^/dev/vfio/vfio$", "iommufd": r"^/dev/iommu$"}[kind]
    with descriptor(edu.vm, pattern) as owner, descriptor(edu.vm, DEVICE[kind]) as fd:
        device = Edu(fd)
        if kind == "type1":
            vfio.map_dma(owner, NEW, NEW_SIZE, address_of(more))
            assert device.copies(more, NEW, 4)
            vfio.unmap_dma(owner, NEW, NEW_SIZE)
        else:
            ioas = state["vfio_devices"][0]["ioas_id"]
            iommufd.map_file(owner, ioas, NEW, NEW_SIZE, file, 0)
            assert device.copies(more, NEW, 4)
            iommufd.unmap(owner, ioas, NEW, NEW_SIZE)
        device.close()
    os.close(file)
    edu.go_on()
    check_running(edu)


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_controller_is_not_reset(kind: str, user: User) -> None:
    with running("nvme", *device_words(kind, NVME), command=user.vmm(kind)) as guest:
        # The guest does not serve INTx, which the kernel masks by a bit of this register.
        enabled, seen = command(NVME) & ~INTX_DISABLE, guest["command"]
        for number in range(1, 7):  # its queues have four slots
            guest["request"] = number
            guest.wait("done", number)
            found = guest.all()
            assert (found["status"], found["slot"]) == (0, (number - 1) % 4), found
            assert (found["cc"], found["csts"]) == (ENABLED, READY), found
            assert found["serial"].to_bytes(4, "little") == b"x   ", found
            assert (found["command"], command(NVME) & ~INTX_DISABLE) == (seen, enabled), found
            guest.vm.update()


@pytest.mark.parametrize("kind", KINDS)
def test_msix_vectors_and_registers_of_an_adapter(kind: str, user: User) -> None:
    with running("e1000e", *device_words(kind, E1000E), command=user.vmm(kind)) as guest:
        check_adapter(guest, 5)
