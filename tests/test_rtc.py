"""The real-time clock: time in its formats, setting it, interrupts, its state."""

from __future__ import annotations

import datetime
import itertools
import time

import pytest
from fake_platform import SteppedPlatform

from cpr.devices import mc146818rtc
from cpr.devices.mc146818rtc import (
    ALARM,
    BINARY,
    CENTURY,
    HOURS,
    HOURS_24,
    HOURS_ALARM,
    MINUTES,
    MINUTES_ALARM,
    MONTH,
    MONTH_DAY,
    PERIODIC,
    REG_A,
    REG_B,
    REG_C,
    REG_D,
    REQUEST,
    SECOND,
    SECONDS,
    SECONDS_ALARM,
    SET,
    UPDATE,
    WEEKDAY,
    YEAR,
    Mc146818Rtc,
    _days,
)

START = "2026-12-31T23:59:58"
ALWAYS = 0xC0


class Board:
    """A chip that follows the guest's clock, which the test advances."""

    def __init__(self, base: str = START) -> None:
        self.platform = SteppedPlatform()
        self.rtc = Mc146818Rtc(base, "vm")
        self.rtc.realize(self.platform)
        self.rtc.reset()

    def get(self, register: int) -> int:
        self.platform.bus.io.write(0x70, 1, register)
        return self.platform.bus.io.read(0x71, 1)

    def set(self, register: int, value: int) -> None:
        self.platform.bus.io.write(0x70, 1, register)
        self.platform.bus.io.write(0x71, 1, value)

    def time(self) -> tuple[int, ...]:
        registers = (CENTURY, YEAR, MONTH, MONTH_DAY, HOURS, MINUTES, SECONDS, WEEKDAY)
        return tuple(self.get(register) for register in registers)

    def advance(self, seconds: float) -> None:
        self.platform.loop.advance(self.platform.clock.now() + int(seconds * SECOND))

    @property
    def line(self) -> bool:
        return self.platform.lines.get(8, False)


@pytest.fixture
def board() -> Board:
    return Board()


def test_time_goes_on_in_bcd(board: Board) -> None:
    assert board.time() == (0x20, 0x26, 0x12, 0x31, 0x23, 0x59, 0x58, 5)
    board.advance(3)
    assert board.time() == (0x20, 0x27, 0x01, 0x01, 0x00, 0x00, 0x01, 6)
    assert board.get(REG_D) == 0x80


def test_binary_and_twelve_hours(board: Board) -> None:
    board.set(REG_B, BINARY | HOURS_24)
    assert board.time() == (20, 26, 12, 31, 23, 59, 58, 5)
    board.set(REG_B, BINARY)
    assert board.get(HOURS) == 0x80 | 11
    board.advance(2)
    assert board.get(HOURS) == 12  # midnight


def test_the_guest_sets_the_time(board: Board) -> None:
    board.set(REG_B, BINARY | HOURS_24)
    board.set(REG_B, SET | BINARY | HOURS_24)
    board.advance(10)  # while SET is, it stands still
    assert board.get(SECONDS) == 58
    for register, value in ((CENTURY, 19), (YEAR, 99), (MONTH, 2), (MONTH_DAY, 3)):
        board.set(register, value)
    for register, value in ((HOURS, 4), (MINUTES, 5), (SECONDS, 6)):
        board.set(register, value)
    board.set(REG_B, BINARY | HOURS_24)
    board.advance(1)
    assert board.time() == (19, 99, 2, 3, 4, 5, 7, 4)


@pytest.mark.parametrize(("register", "value"), [(MONTH, 0x13), (CENTURY, 0xFF), (MONTH_DAY, 0x32)])
def test_a_date_that_is_none_changes_nothing(board: Board, register: int, value: int) -> None:
    board.set(register, value)
    assert board.time()[:4] == (0x20, 0x26, 0x12, 0x31)


def test_days_are_those_of_the_calendar() -> None:
    for year in (1, 4, 100, 400, 1899, 1900, 1970, 1999, 2000, 2026, 2100, 9999):
        for month, day in itertools.product(range(14), (0, 1, 28, 29, 30, 31, 32)):
            try:
                expected = (datetime.date(year, month, day) - datetime.date(1970, 1, 1)).days
            except ValueError:
                expected = None
            assert _days(year, month, day) == expected
    assert _days(0, 1, 1) is None and _days(10000, 1, 1) is None


def test_update_in_progress_comes_before_the_second(board: Board) -> None:
    assert not board.get(REG_A) & 0x80
    board.advance(1 - 100e-6)
    assert board.get(REG_A) & 0x80
    board.advance(100e-6)
    assert not board.get(REG_A) & 0x80


def test_an_interrupt_each_second(board: Board) -> None:
    board.set(REG_B, HOURS_24 | UPDATE)
    board.advance(1)
    assert board.line
    assert board.get(REG_C) == REQUEST | UPDATE
    assert not board.line
    assert board.get(REG_C) == 0
    board.advance(1)
    assert board.line


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x00, 0x00, 0x10), 12),
        ((ALWAYS, ALWAYS, 0x07), 9),
        ((ALWAYS, 0x01, 0x00), 62),
        ((0x23, 0x59, 0x57), 86399),
        ((ALWAYS, ALWAYS, ALWAYS), 1),
    ],
)
def test_alarm(board: Board, alarm: tuple[int, int, int], seconds: int) -> None:
    for register, value in zip((HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM), alarm, strict=True):
        board.set(register, value)
    board.get(REG_C)
    board.set(REG_B, HOURS_24 | ALARM)
    board.advance(seconds - 0.5)
    assert not board.line
    board.advance(0.5)
    assert board.line
    assert board.get(REG_C) == REQUEST | UPDATE | ALARM


def test_periodic_interrupt(board: Board) -> None:
    board.set(REG_A, 0x2F)  # 2 a second
    board.set(REG_B, HOURS_24 | PERIODIC)
    board.advance(0.4)
    assert not board.line
    board.advance(0.1)
    assert board.line
    assert board.get(REG_C) & PERIODIC
    board.advance(0.5)
    assert board.line


def test_only_a_chip_that_was_used_has_a_section(board: Board) -> None:
    assert not board.rtc.needed()
    board.get(SECONDS)
    assert board.rtc.needed()


def test_state(board: Board) -> None:
    board.set(0x40, 0x5A)
    board.set(HOURS_ALARM, 0x00)
    board.set(MINUTES_ALARM, 0x00)
    board.set(SECONDS_ALARM, 0x10)
    board.set(REG_B, HOURS_24 | ALARM)
    board.advance(1.25)
    state = board.rtc.save()
    board.rtc.check(state)
    assert state["cmos_data"][SECONDS] == 0x59

    other = Board("2000-01-01")
    other.platform.clock.time = board.platform.clock.now()
    other.rtc.restore(state)
    other.rtc.on_run()
    assert other.time() == board.time()
    assert other.get(0x40) == 0x5A
    other.advance(10.74)
    assert not other.line
    other.advance(0.02)
    assert other.line


@pytest.mark.parametrize(("mode", "late"), [(ALARM, 0.7), (ALARM, 3600), (0, 0.7)])
def test_an_alarm_that_is_due_while_the_guest_stands_still(monkeypatch, mode, late) -> None:
    """It comes when the guest goes on, here or in another VMM; also one that is polled for."""
    now = 1_000_000_000 * SECOND
    monkeypatch.setattr(mc146818rtc.time, "time", lambda: now / SECOND)
    monkeypatch.setattr(mc146818rtc.time, "time_ns", lambda: now)
    boards = []
    for _ in range(2):
        boards.append(Board.__new__(Board))
        boards[-1].platform = SteppedPlatform()
        boards[-1].rtc = Mc146818Rtc()
        boards[-1].rtc.realize(boards[-1].platform)
    old, new = boards
    for register in (HOURS_ALARM, MINUTES_ALARM):
        old.set(register, ALWAYS)
    old.set(SECONDS_ALARM, 0x42)
    old.set(REG_B, HOURS_24 | mode)
    assert old.get(SECONDS) == 0x40
    now += int(1.9 * SECOND)
    old.rtc.on_stop()
    state = old.rtc.save()
    now += int(late * SECOND)
    new.rtc.restore(state)
    for board in boards:
        assert not board.line
        board.rtc.on_run()
        assert board.line == bool(mode)
        assert board.get(REG_C) & ALARM
        assert not board.get(REG_C) & ALARM


def test_the_hosts_clock_goes_on_while_the_guest_does_not(monkeypatch) -> None:
    now = 1_000_000_000
    monkeypatch.setattr(mc146818rtc.time, "time", lambda: now)
    monkeypatch.setattr(mc146818rtc.time, "time_ns", lambda: now * SECOND)
    board = Board.__new__(Board)
    board.platform = SteppedPlatform()
    board.rtc = Mc146818Rtc()
    board.rtc.realize(board.platform)
    board.set(REG_B, BINARY | HOURS_24)
    assert board.time()[:7] == (20, 1, 9, 9, 1, 46, 40)
    board.rtc.on_stop()
    now += 3600
    board.rtc.on_run()
    assert board.time()[:7] == (20, 1, 9, 9, 2, 46, 40)
    assert time.gmtime(now).tm_hour == 2


@pytest.mark.parametrize(
    ("field", "value"), [("cmos_index", 200), ("base_rtc", 1 << 50), ("last_update", 1 << 63)]
)
def test_states_that_are_refused(board: Board, field: str, value: int) -> None:
    board.get(SECONDS)
    with pytest.raises(ValueError, match=field):
        board.rtc.check(board.rtc.save() | {field: value})
