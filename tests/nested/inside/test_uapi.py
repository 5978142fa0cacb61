"""The uapi layer alone, across a real exec: what the kernel keeps, and what it hands over."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
from harness.vm import ROOT

from .conftest import MEMLOCK, User
from .machine import EDU, NVME, command
from .nvme import ENABLED, READY

KIB = 64 << 10  # of RAM
MORE_KIB = 2 << 10


def across_exec(kind: str, address: str, before: list[str] | None = None) -> list[dict]:
    """Runs the process, with `before` in front; returns the facts of its two images."""
    words = [
        *(before or []),
        sys.executable,
        "-m",
        "tests.nested.inside.across_exec",
        kind,
        address,
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.nested_smoke
def test_type1_goes_over_an_exec(user: User) -> None:
    before, after = across_exec("type1", EDU, user.words(MEMLOCK["type1"]))
    assert before["dma"] and before["interrupts"] == 1
    assert before["locked"] == KIB
    assert after["moved"], "RAM is at the same address, which proves nothing"
    assert after["locked"] == [0, KIB, KIB + MORE_KIB, 0]
    assert after["wrong_size"] == errno.EINVAL
    assert after["again"] == errno.EINVAL  # there is no address to update: it was taken
    assert after["in_flight"], "the DMA that ran during the exec did not write"
    assert after["interrupts_meanwhile"] == 1
    assert after["cause"] == 0x100
    assert after["dma"] and after["new_mapping"]
    assert after["interrupts"] == 1
    assert after["command"] == before["command"]


@pytest.mark.iommufd
def test_iommufd_goes_over_an_exec(user: User) -> None:
    before, after = across_exec("iommufd", EDU, user.words(MEMLOCK["iommufd"]))
    assert before["dma"] and before["interrupts"] == 1
    assert after["change_process"] == 0
    assert after["in_flight"], "the DMA that ran during the exec did not write"
    assert after["interrupts_meanwhile"] == 1
    assert after["cause"] == 0x100
    assert after["dma"] and after["new_mapping"]
    assert after["interrupts"] == 1
    assert after["command"] == before["command"]
    assert after["not_a_file"] == errno.EINVAL


@pytest.mark.iommufd
def test_change_process_needs_twice_the_memlock(user: User) -> None:
    """The kernel charges the new process before it takes off the old one's charge."""
    before, after = across_exec("iommufd", EDU, user.words(MEMLOCK["type1"]))
    assert before["dma"]
    assert after["change_process"] == (0 if user.name == "root" else errno.ENOMEM)
    assert after["in_flight"] and after["dma"], "the device must work on"


def test_a_controller_whose_descriptor_is_kept_is_not_reset() -> None:
    before, after = across_exec("nvme-kept", NVME)
    assert before == {"identify": "x", "cc": ENABLED, "csts": READY}
    assert after == {"identify": "x", "cc": ENABLED, "csts": READY}


def test_a_controller_that_is_opened_again_is_reset() -> None:
    """The control of the test above: this is what a reset looks like."""
    before, after = across_exec("nvme-reopened", NVME)
    assert before["cc"] == ENABLED
    assert after == {"cc": 0, "csts": 0}


def test_command_register_of_a_device_that_nobody_has_open() -> None:
    assert command(EDU) & 0x4 == 0, "bus mastering is left on"
