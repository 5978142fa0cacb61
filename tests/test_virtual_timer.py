"""Timers on the guest's time."""

from __future__ import annotations

import threading

import pytest
from fake_platform import SteppedPlatform

from cpr.devices.virtual_timer import CATCH_UP_NS, VirtualTimer


@pytest.fixture
def platform() -> SteppedPlatform:
    return SteppedPlatform()


@pytest.fixture
def calls() -> list[int]:
    return []


@pytest.fixture
def timer(platform: SteppedPlatform, calls: list[int]) -> VirtualTimer:
    return VirtualTimer(platform, calls.append)


def test_fires_once(platform: SteppedPlatform, timer: VirtualTimer, calls: list[int]) -> None:
    timer.set(1000)
    platform.loop.advance(999)
    assert (calls, timer.deadline) == ([], 1000)
    platform.loop.advance(5000)
    assert (calls, timer.deadline) == ([1000], None)


def test_is_replaced_and_cancelled(
    platform: SteppedPlatform, timer: VirtualTimer, calls: list[int]
) -> None:
    timer.set(1000)
    timer.set(2000)
    platform.loop.advance(1500)
    assert calls == []
    timer.set(None)
    platform.loop.advance(3000)
    assert calls == []


def test_callback_may_set_it_again(platform: SteppedPlatform) -> None:
    calls: list[int] = []

    def again(deadline: int) -> None:
        calls.append(deadline)
        repeated.set(deadline + 10)

    repeated = VirtualTimer(platform, again)
    repeated.set(10)
    platform.loop.advance(35)
    assert calls == [10, 20, 30]
    assert repeated.deadline == 40


def test_stands_still_with_the_clock(
    platform: SteppedPlatform, timer: VirtualTimer, calls: list[int]
) -> None:
    platform.clock.enabled = False
    timer.set(1000)
    assert platform.loop.armed() == []
    platform.clock.enabled = True
    timer.start()
    assert platform.loop.armed() == [1000]
    platform.clock.enabled = False
    timer.stop()
    assert platform.loop.armed() == []
    assert timer.deadline == 1000
    platform.clock.enabled = True
    timer.start()
    platform.loop.advance(1000)
    assert calls == [1000]


def test_replaced_while_the_main_loop_waits_for_the_lock(
    platform: SteppedPlatform, timer: VirtualTimer, calls: list[int]
) -> None:
    timer.set(1000)
    due = platform.loop.timers[0]
    with platform.lock:
        loop = threading.Thread(target=platform.loop.fire, args=(due,))
        loop.start()
        timer.set(2000)
    loop.join()
    assert calls == []
    assert timer.deadline == 2000


def test_periodic_timers_catch_up_but_not_for_ever(
    platform: SteppedPlatform, timer: VirtualTimer
) -> None:
    platform.clock.time = CATCH_UP_NS + 1000
    assert timer.late(2000) == 2000
    assert timer.late(500) == 1000
