"""rate.py: with a clock of the test's own."""

from __future__ import annotations

import pytest

from cpr.constants import MIB
from cpr.migration import rate

MS = 1_000_000


class Clock:
    """Time passes only in `wait`."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1_000_000_000
        self.stopped = False
        monkeypatch.setattr(rate.time, "monotonic_ns", lambda: self.now)

    def wait(self, ns: int) -> bool:
        assert 0 < ns <= rate.WINDOW_NS
        self.now += ns
        return self.stopped


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("limit", [4096, 100_000, MIB, 128 * MIB])
def test_no_more_than_the_limit_in_any_time(clock, limit):
    limiter = rate.RateLimit(lambda: limit, clock.wait)
    started, taken = clock.now, 0
    while clock.now - started < 5_000 * MS:
        budget = limiter.budget()
        size = budget // 4096 * 4096
        assert size >= 4096
        limiter.spend(size)
        taken += size
        allowed = limit * (clock.now - started + rate.WINDOW_NS) / 1e9
        assert taken <= allowed + 4096
    assert taken >= limit * 4.9 - 4096, "and the limit is made use of"


def test_what_was_not_used_is_forgotten(clock):
    limiter = rate.RateLimit(lambda: 10 * MIB, clock.wait)
    limiter.budget()
    clock.now += 60_000 * MS
    assert limiter.budget() <= MIB


def test_no_limit(clock):
    limiter = rate.RateLimit(lambda: 0, clock.wait)
    before = clock.now
    for _ in range(100):
        assert limiter.budget() == rate.SLICE
        limiter.spend(rate.SLICE)
    assert clock.now == before


def test_a_change_holds_at_once(clock):
    limits = [4096]
    limiter = rate.RateLimit(lambda: limits[0], clock.wait)
    limiter.spend(limiter.budget())
    limits[0] = 0
    assert limiter.budget() == rate.SLICE


def test_an_end_of_waiting(clock):
    limiter = rate.RateLimit(lambda: 4096, clock.wait)
    limiter.spend(limiter.budget())
    clock.stopped = True
    assert limiter.budget() == 0
