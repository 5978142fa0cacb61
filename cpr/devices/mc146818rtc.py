"""The real-time clock MC146818 (data sheet, ADI856R2) with its CMOS RAM, at ports 0x70 and 0x71.

Its time follows the clock that -rtc names: the host's wall clock, whatever the guest does, or the
guest's own.  The century is in byte 0x32, where ACPI says that it is.  A guest that has never
touched the chip has no section of it in its stream.
"""

from __future__ import annotations

import time

from cpr.constants import U64_LIMIT
from cpr.devices.base import Device, check_range
from cpr.devices.virtual_timer import LEAST_PERIOD_NS, VirtualTimer
from cpr.state.vmstate import VMStateDescription, buffer, i64, u8, u32, u64, unused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.acpi.tables import Acpi
    from cpr.devices.base import Platform

INDEX_PORT, DATA_PORT = 0x70, 0x71
IRQ = 8
CMOS_SIZE = 128
INDEX = 0x7F  # the bit above masks NMIs
SECOND = 1_000_000_000
DAY = 86400
DAYS_BEFORE_1970 = 719162  # from 0001-01-01
MOST_YEAR = 9999  # in the registers of year and century
NEVER = -1
MOST_NS = (1 << 63) - 1  # of a time in the stream

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, MONTH_DAY, MONTH, YEAR, REG_A, REG_B, REG_C, REG_D = range(6, 14)
CENTURY = 0x32
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, MONTH_DAY, MONTH, YEAR, CENTURY)
ANY = 0xC0  # an alarm register from here on matches always

UPDATE_IN_PROGRESS, RATE = 0x80, 0x0F  # register A
SET, BINARY, HOURS_24 = 0x80, 0x04, 0x02  # register B
PERIODIC, ALARM, UPDATE = 0x40, 0x20, 0x10  # registers B and C
INTERRUPTS = PERIODIC | ALARM | UPDATE
REQUEST = 0x80  # register C
VALID = 0x80  # register D
AT_POWER_ON = {REG_A: 0x26, REG_B: HOURS_24, REG_D: VALID}
PM = 0x80  # in the hours of the 12-hour mode
UPDATE_NS = 244_141  # for so long before a second ends UIP warns of it
OSCILLATOR_HZ = 32768


class Mc146818Rtc(Device):
    """`base` is "utc", "localtime" or a date as -rtc has it; `clock` "host", "rt" or "vm"."""

    idstr = "mc146818rtc"
    vmstate = VMStateDescription(
        "mc146818rtc",
        3,
        1,
        (
            buffer("cmos_data", CMOS_SIZE),
            u8("cmos_index"),
            unused(28),
            i64("periodic_timer"),
            i64("next_periodic_time"),
            unused(24),
            u32("irq_coalesced"),
            u32("period"),
            u64("base_rtc"),
            u64("last_update"),
            i64("offset"),
            i64("update_timer"),
            u64("next_alarm_time"),
        ),
    )

    def __init__(self, base: str = "utc", clock: str = "host") -> None:
        self._platform: Platform | None = None
        self._base_option = base
        self._clock_option = clock
        self._cmos = bytearray(CMOS_SIZE)
        for register, value in AT_POWER_ON.items():
            self._cmos[register] = value
        self._index = 0
        self._touched = False
        self._base = 0  # s since 1970 that it showed
        self._last_update = 0  # at this time of its clock, in ns
        self._offset = 0  # and so many ns
        self._seen = 0  # the second up to which flags are in register C

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        self._periodic_timer = VirtualTimer(platform, self._on_period)
        self._second_timer = VirtualTimer(platform, lambda deadline: self._update())
        self._set(_start(self._base_option), 0)
        platform.register_io(INDEX_PORT, 2, self._read, self._write, "rtc")

    def unrealize(self) -> None:
        if self._platform is not None:
            self._periodic_timer.set(None)
            self._second_timer.set(None)
            self._platform.unregister_io(INDEX_PORT, 2)
            self._platform = None

    def describe(self, acpi: Acpi) -> None:
        from cpr.acpi import aml
        from cpr.acpi.tables import NO_CMOS_RTC

        acpi.set_fadt(CENTURY=CENTURY)
        acpi.clear_boot_flags(NO_CMOS_RTC)
        where = aml.resources(aml.io_ports(INDEX_PORT, 2), aml.irq(IRQ))
        names = (aml.name("_HID", aml.eisa_id("PNP0B00")), aml.name("_CRS", where))
        acpi.add_device(aml.device("RTC", *names))

    def reset(self) -> None:
        self._cmos[REG_B] &= ~INTERRUPTS
        self._cmos[REG_C] = 0
        self._update()
        self._arm_periodic()

    def needed(self) -> bool:
        return self._touched

    def save(self) -> dict:
        if not self._cmos[REG_B] & SET:
            self._store_time()
        periodic, interrupt = self._periodic_timer.deadline, self._next_interrupt()
        alarm = 0 if self._cmos[REG_B] & SET else self._time_of(self._next_alarm(self._seen))
        return {
            "cmos_data": bytes(self._cmos),
            "cmos_index": self._index,
            "periodic_timer": NEVER if periodic is None else periodic,
            "next_periodic_time": periodic or 0,
            "irq_coalesced": 0,
            "period": self._period() * OSCILLATOR_HZ // SECOND,
            "base_rtc": self._base % U64_LIMIT,
            "last_update": self._last_update,
            "offset": self._offset,
            "update_timer": NEVER if interrupt is None else self._time_of(interrupt),
            "next_alarm_time": alarm,
        }

    def check(self, state: dict) -> None:
        check_range("cmos_index", state["cmos_index"], 0, INDEX)
        check_range("base_rtc", _signed(state["base_rtc"]), -(1 << 40), 1 << 40)
        check_range("last_update", state["last_update"], 0, 1 << 62)
        check_range("offset", state["offset"], -(1 << 62), 1 << 62)

    def restore(self, state: dict) -> None:
        self._touched = True
        self._cmos[:] = state["cmos_data"]
        self._index = state["cmos_index"]
        self._base = _signed(state["base_rtc"])
        self._last_update = state["last_update"]
        self._offset = state["offset"]
        self._seen = self._now() // SECOND
        for due in (state["update_timer"], state["next_alarm_time"]):
            if due >= self._last_update:  # what was due while nobody ran the guest is not lost
                self._seen = min(self._seen, self._second_at(due) - 1)
        deadline = state["periodic_timer"]
        self._periodic_timer.set(None if deadline == NEVER else deadline)

    def on_run(self) -> None:
        self._periodic_timer.start()
        self._update()

    def on_stop(self) -> None:
        self._update()  # so that what has happened by now is in what is saved
        self._periodic_timer.stop()
        self._second_timer.stop()

    # The time.

    def _clock_now(self) -> int:
        """ns of the clock that the chip follows."""
        if self._clock_option == "vm":
            return self._platform.clock.now() if self._platform is not None else 0
        return time.time_ns() if self._clock_option == "host" else time.monotonic_ns()

    def _now(self) -> int:
        """ns since 1970 that the chip shows."""
        if self._cmos[REG_B] & SET:
            return self._base * SECOND + self._offset
        return self._base * SECOND + self._clock_now() - self._last_update + self._offset

    def _second_at(self, clock: int) -> int:
        """The second, since 1970, that the chip shows at this time of its clock, in ns."""
        return self._base + (clock - self._last_update + self._offset) // SECOND

    def _time_of(self, second: int) -> int:
        """The inverse: the time of its clock, in ns, at which that second begins."""
        clock = (second - self._base) * SECOND + self._last_update - self._offset
        return min(max(0, clock), MOST_NS)

    def _set(self, seconds: int, offset: int) -> None:
        self._base, self._offset = seconds, offset
        self._last_update = self._clock_now()
        self._seen = seconds

    def _encode(self, value: int) -> int:
        return value if self._cmos[REG_B] & BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._cmos[REG_B] & BINARY else (value >> 4) * 10 + (value & 0xF)

    def _store_time(self) -> None:
        """Writes what the chip shows now into its registers."""
        now = time.gmtime(self._now() // SECOND)
        hour, flag = now.tm_hour, 0
        if not self._cmos[REG_B] & HOURS_24:
            hour, flag = (now.tm_hour + 11) % 12 + 1, PM if now.tm_hour >= 12 else 0
        century, year = divmod(now.tm_year, 100)
        weekday = (now.tm_wday + 1) % 7 + 1
        values = (now.tm_sec, now.tm_min, hour, weekday, now.tm_mday, now.tm_mon, year, century)
        for register, value in zip(TIME_REGISTERS, values, strict=True):
            self._cmos[register] = self._encode(value)
        self._cmos[HOURS] |= flag

    def _hour(self, value: int) -> int:
        """The hour, 0 to 23, of an hours register."""
        if self._cmos[REG_B] & HOURS_24:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)

    def _take_time(self) -> None:
        """The guest has set the time registers; values that are no time are left as they are."""
        second, minute, _, _, day, month, year, century = (
            self._decode(self._cmos[register]) for register in TIME_REGISTERS
        )
        hour = self._hour(self._cmos[HOURS])
        days = _days(century * 100 + year, month, day)
        if days is not None and hour < 24 and minute < 60 and second < 60:
            since = days * DAY + (hour * 60 + minute) * 60 + second
            self._set(max(0, since), self._offset)

    # Interrupts.

    def _period(self) -> int:
        """ns of the periodic interrupt; 0 where its rate is off."""
        rate = self._cmos[REG_A] & RATE
        if not rate:
            return 0
        return (1 << (rate + 7 if rate <= 2 else rate) - 1) * SECOND // OSCILLATOR_HZ

    def _arm_periodic(self) -> None:
        period = self._period()
        if not period or not self._cmos[REG_B] & PERIODIC or self._platform is None:
            self._periodic_timer.set(None)
        elif self._periodic_timer.deadline is None:
            self._periodic_timer.set(self._platform.clock.now() + max(period, LEAST_PERIOD_NS))

    def _on_period(self, deadline: int) -> None:
        self._raise(PERIODIC)
        period = max(self._period(), LEAST_PERIOD_NS)
        self._periodic_timer.set(self._periodic_timer.late(deadline) + period)

    def _update(self) -> None:
        """Puts the flags of the seconds that have ended into register C; waits for the next."""
        if self._platform is None:
            return
        if self._cmos[REG_B] & SET:
            self._second_timer.set(None)
            return
        now = self._now()
        if now // SECOND > self._seen:
            alarm = self._next_alarm(self._seen) <= now // SECOND
            self._seen = now // SECOND
            self._raise(UPDATE | (ALARM if alarm else 0))
        second = self._next_interrupt()
        if second is None:
            self._second_timer.set(None)
        else:
            wait = max(0, second * SECOND - now)
            self._second_timer.set(self._platform.clock.now() + wait)

    def _next_interrupt(self) -> int | None:
        """The second at which one is due, by what register B has; None where it has none."""
        if self._cmos[REG_B] & SET:
            return None
        if self._cmos[REG_B] & UPDATE:
            return self._seen + 1
        return self._next_alarm(self._seen) if self._cmos[REG_B] & ALARM else None

    def _next_alarm(self, after: int) -> int:
        """The first second after `after` that the alarm registers match."""
        second, minute = self._cmos[SECONDS_ALARM], self._cmos[MINUTES_ALARM]
        hour = self._cmos[HOURS_ALARM]
        hours = range(24) if hour >= ANY else (self._hour(hour),)
        minutes = range(60) if minute >= ANY else (self._decode(minute),)
        seconds = range(60) if second >= ANY else (self._decode(second),)
        midnight, past = after - after % DAY, after % DAY
        for h in hours:
            for m in minutes:
                start = h * 3600 + m * 60
                if start + seconds[-1] > past:
                    return midnight + start + max(seconds[0], past + 1 - start)
        return midnight + DAY + hours[0] * 3600 + minutes[0] * 60 + seconds[0]

    def _raise(self, flags: int) -> None:
        self._cmos[REG_C] |= flags
        if self._cmos[REG_C] & self._cmos[REG_B] & INTERRUPTS:
            self._cmos[REG_C] |= REQUEST
            if self._platform is not None:
                self._platform.set_irq(IRQ, True)

    # Accesses by the guest.

    def _read(self, offset: int, size: int) -> int:
        self._touched = True
        if offset == 0:
            return 0xFF
        register = self._index
        if register in TIME_REGISTERS and not self._cmos[REG_B] & SET:
            self._store_time()
        elif register == REG_A:
            left = SECOND - self._now() % SECOND
            is_updating = left <= UPDATE_NS and not self._cmos[REG_B] & SET
            return self._cmos[REG_A] | (UPDATE_IN_PROGRESS if is_updating else 0)
        elif register == REG_C:
            self._update()
            value = self._cmos[REG_C]
            self._cmos[REG_C] = 0
            if self._platform is not None:
                self._platform.set_irq(IRQ, False)
            return value
        return self._cmos[register]

    def _write(self, offset: int, size: int, value: int) -> None:
        self._touched = True
        if offset == 0:
            self._index = value & INDEX
            return
        register = self._index
        if register in TIME_REGISTERS:
            if not self._cmos[REG_B] & SET:
                self._store_time()
            self._cmos[register] = value
            if not self._cmos[REG_B] & SET:
                self._take_time()
        elif register == REG_A:
            self._cmos[REG_A] = value & ~UPDATE_IN_PROGRESS
            self._periodic_timer.set(None)
            self._arm_periodic()
        elif register == REG_B:
            self._write_mode(value)
        elif register not in (REG_C, REG_D):
            self._cmos[register] = value
            self._update()

    def _write_mode(self, value: int) -> None:
        """Register B: what interrupts, the format of the time, and whether it stands still."""
        was_set = self._cmos[REG_B] & SET
        if value & SET and not was_set:
            now = self._now()
            self._store_time()
            self._base, self._offset = divmod(now, SECOND)
        self._cmos[REG_B] = value
        if was_set and not value & SET:
            self._take_time()
        self._update()
        self._raise(0)
        self._arm_periodic()


def _start(base: str) -> int:
    """s since 1970 that the chip shows at power-on."""
    if base == "utc":
        return int(time.time())
    import datetime

    is_local = base == "localtime"
    date = datetime.datetime.now() if is_local else datetime.datetime.fromisoformat(base)
    since = date - datetime.datetime(1970, 1, 1)
    return since.days * DAY + since.seconds


def _days(year: int, month: int, day: int) -> int | None:
    """Since 1970-01-01 in the Gregorian calendar; None for what is no date.

    Without `datetime`, whose files may be gone when a guest sets its clock.
    """
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 28 + is_leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if not 1 <= year <= MOST_YEAR or not 1 <= month <= 12 or not 1 <= day <= lengths[month - 1]:
        return None
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400
    return days + sum(lengths[: month - 1]) + day - 1 - DAYS_BEFORE_1970


def _signed(seconds: int) -> int:
    """Of a time before 1970, too, as a C program has it in 64 bits."""
    return seconds - U64_LIMIT if seconds >> 63 else seconds
