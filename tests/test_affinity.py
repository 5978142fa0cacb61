"""Where a thread may run, as the kernel is told."""

from __future__ import annotations

import os
import threading

import pytest

from cpr.uapi.affinity import cpu_mask, set_affinity


@pytest.mark.parametrize(
    ("cpus", "mask"),
    [
        ([], bytes(8)),
        ([0], b"\1" + bytes(7)),
        ([1, 0, 1], b"\3" + bytes(7)),
        ([63], bytes(7) + b"\x80"),
        ([64, 0], b"\1" + bytes(7) + b"\1" + bytes(7)),
    ],
)
def test_masks(cpus, mask):
    assert cpu_mask(cpus) == mask


def test_a_thread_is_moved():
    one = {min(os.sched_getaffinity(0))}
    found = []

    def move() -> None:
        set_affinity(0, one)
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=move)
    thread.start()
    thread.join()
    assert found == [one]


@pytest.mark.parametrize("cpus", [[], [100_000]])
def test_cpus_that_are_none_are_refused(cpus):
    before = os.sched_getaffinity(0)
    with pytest.raises(OSError, match="Invalid argument"):
        set_affinity(0, cpus)
    assert os.sched_getaffinity(0) == before
