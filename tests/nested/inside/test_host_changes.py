"""The host changes its mind while a guest has the device: limits, and the wish to have it back."""

from __future__ import annotations

import resource
import subprocess

import pytest
from waiting import wait_for

from .conftest import MEMLOCK, User, give_devices
from .guest import KINDS, SECONDS, check_running, device_words, locked, running
from .machine import EDU, device, driver

USER = 1000


def test_a_limit_that_was_lowered_is_made_up_for_later() -> None:
    """type1: the kernel refuses the new addresses (ENOMEM); DMA goes on, the pages stay pinned."""
    give_devices(USER)
    limit = MEMLOCK["type1"]
    with running("edu", *device_words("type1", EDU), command=User("user").vmm("type1")) as guest:
        guest.wait("rounds", 1)
        before = locked(guest.vm.pid)
        resource.prlimit(guest.vm.pid, resource.RLIMIT_MEMLOCK, (1 << 20, limit))
        guest.vm.update()
        check_running(guest)
        assert locked(guest.vm.pid) < before
        assert "VFIO_IOMMU_MAP_DMA" in guest.vm.stderr
        assert "RLIMIT_MEMLOCK" in guest.vm.stderr
        resource.prlimit(guest.vm.pid, resource.RLIMIT_MEMLOCK, (limit, limit))
        guest.vm.qmp.command("migrate-set-parameters", mode="cpr-exec")
        guest.vm.qmp.command("query-migrate")
        assert locked(guest.vm.pid) == before
        guest.vm.update()
        check_running(guest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_is_unbound_goes_with_the_vm(kind: str) -> None:
    """The kernel waits for the VMM to give it up, asks, and goes on waiting over an update."""
    with running("edu", *device_words(kind, EDU)) as guest:
        guest.wait("rounds", 1)
        path = device(EDU) / "driver" / "unbind"
        with subprocess.Popen(["sh", "-c", f"echo {EDU} > {path}"]) as unbinding:
            try:
                asked = f"the host wants {EDU} back"
                wait_for(lambda: asked in guest.vm.stderr, "the VMM says so", SECONDS)
                check_running(guest)
                guest.vm.update()
                check_running(guest)
                assert unbinding.poll() is None
            finally:
                guest.vm.process.kill()  # else the kernel, and so this process, waits for ever
            guest.vm.process.wait()
            assert unbinding.wait(SECONDS) == 0
    assert driver(EDU) is None
