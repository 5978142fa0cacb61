"""The 8254 timer (Intel 8254 data sheet, 231164) at ports 0x40 to 0x43, and port 0x61 beside it.

Channel 0 is IRQ 0; channel 2 has its gate and its output in port 0x61, the speaker's.  Counters
are not run: what they hold follows from the time at which they were loaded.
"""

from __future__ import annotations

from cpr.constants import NS_PER_S
from cpr.devices.base import Device, IrqchipDevice, check_range, check_time
from cpr.devices.virtual_timer import LEAST_PERIOD_NS, VirtualTimer
from cpr.state.vmstate import VMStateDescription, i32, i64, struct_, u8, u16, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.devices.base import Platform

BASE = 0x40
CONTROL = 3
SPEAKER_PORT = 0x61
IRQ = 0
FREQUENCY = 1193182
MOST_COUNT = 1 << 16  # which is what a count of 0 means

# Counter modes (the data sheet's "mode definitions").
TERMINAL_COUNT, ONE_SHOT, RATE, SQUARE_WAVE, SOFTWARE_STROBE, HARDWARE_STROBE = range(6)
# What the next access to a data port is: `rw_mode`, `read_state` and `write_state`.
LATCH, LOW, HIGH, LOW_THEN_HIGH, HIGH_OF_BOTH = range(5)

READ_BACK = 3
READ_BACK_NO_COUNT, READ_BACK_NO_STATUS = 0x20, 0x10

# Port 0x61.
GATE_2, SPEAKER_DATA, REFRESH, OUT_2 = 0x01, 0x02, 0x10, 0x20

# Flags of struct kvm_pit_state2 (asm/kvm.h).
KVM_HPET_LEGACY, KVM_SPEAKER_DATA = 0x01, 0x02

CHANNEL_FIELDS = (
    i32("count"),
    u16("latched_count"),
    u8("count_latched"),
    u8("status_latched"),
    u8("status"),
    u8("read_state"),
    u8("write_state"),
    u8("write_latch"),
    u8("rw_mode"),
    u8("mode"),
    u8("bcd"),
    u8("gate"),
    i64("count_load_time"),
    i64("next_transition_time"),
)
VMSTATE_CHANNEL = VMStateDescription("pit channel", 2, 2, CHANNEL_FIELDS)


class Channel:
    """One counter.  Times are ns of the virtual clock; `next_transition_time` -1 means never."""

    __slots__ = tuple(field.name for field in CHANNEL_FIELDS)

    count: int
    latched_count: int
    count_latched: int
    status_latched: int
    status: int
    read_state: int
    write_state: int
    write_latch: int
    rw_mode: int
    mode: int
    bcd: int
    gate: int
    count_load_time: int
    next_transition_time: int

    def __init__(self) -> None:
        self.reset(0, True)

    def reset(self, now: int, gate: bool) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)
        self.mode = SQUARE_WAVE
        self.gate = int(gate)
        self.load(0, now)

    def load(self, count: int, now: int) -> None:
        self.count = count or 0x10000
        self.count_load_time = now
        self.next_transition_time = self.transition_after(now)

    @property
    def is_periodic(self) -> bool:
        return self.mode in (RATE, SQUARE_WAVE)

    def elapsed(self, now: int) -> int:
        """Clock ticks since the counter was loaded."""
        return (now - self.count_load_time) * FREQUENCY // NS_PER_S

    def counter(self, now: int) -> int:
        """The value of the counter."""
        ticks = self.elapsed(now)
        if self.mode == RATE:
            return self.count - ticks % self.count & 0xFFFF
        if self.mode == SQUARE_WAVE:
            return self.count - 2 * ticks % self.count & 0xFFFF
        return self.count - ticks & 0xFFFF

    def output(self, now: int) -> bool:
        """The OUT signal; modes 2, 4 and 5 as a pulse where the chip pulls it low."""
        ticks = self.elapsed(now)
        if self.mode == TERMINAL_COUNT:
            return ticks >= self.count
        if self.mode == ONE_SHOT:
            return ticks < self.count
        if self.mode == RATE:
            return ticks > 0 and ticks % self.count == 0
        if self.mode == SQUARE_WAVE:
            return ticks % self.count < (self.count + 1) // 2
        return ticks == self.count

    def transition_after(self, now: int) -> int:
        """The first time after `now` at which OUT changes, or -1."""
        ticks = self.elapsed(now)
        start = ticks - ticks % self.count
        if self.mode in (TERMINAL_COUNT, ONE_SHOT):
            next_ticks = self.count if ticks < self.count else -1
        elif self.mode == RATE:
            next_ticks = start + 1 if ticks == start > 0 else start + self.count
        elif self.mode == SQUARE_WAVE:
            half = start + (self.count + 1) // 2
            next_ticks = half if ticks < half else start + self.count
        else:
            next_ticks = max(self.count, ticks + 1) if ticks <= self.count else -1
        if next_ticks < 0:
            return -1
        # Rounded up, so that `elapsed` has that many ticks then.
        return self.count_load_time + -(-next_ticks * NS_PER_S // FREQUENCY)

    def latch_count(self, now: int) -> None:
        if not self.count_latched:
            self.latched_count = self.counter(now)
            self.count_latched = self.rw_mode

    def latch_status(self, now: int) -> None:
        if not self.status_latched:
            out = self.output(now) << 7
            self.status = out | self.rw_mode << 4 | self.mode << 1 | self.bcd
            self.status_latched = 1

    def program(self, value: int) -> None:
        """Takes a control word that is for this channel; counting starts with the next count."""
        access = value >> 4 & 3
        self.rw_mode = self.read_state = self.write_state = access
        mode = value >> 1 & 7
        self.mode = mode if mode <= HARDWARE_STROBE else mode & 3
        self.bcd = value & 1

    def read(self, now: int) -> int:
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.count_latched:
            wants_high = self.count_latched == HIGH
            self.count_latched = HIGH if self.count_latched == LOW_THEN_HIGH else LATCH
            return self.latched_count >> 8 if wants_high else self.latched_count & 0xFF
        count = self.counter(now)
        state = self.read_state
        if state == LOW_THEN_HIGH:
            self.read_state = HIGH_OF_BOTH
        elif state == HIGH_OF_BOTH:
            self.read_state = LOW_THEN_HIGH
        return count >> 8 if state in (HIGH, HIGH_OF_BOTH) else count & 0xFF

    def write(self, value: int, now: int) -> bool:
        """Takes a byte of the count; true if the count is complete and loaded."""
        if self.write_state == LOW_THEN_HIGH:
            self.write_latch = value
            self.write_state = HIGH_OF_BOTH
            return False
        if self.write_state == HIGH_OF_BOTH:
            self.write_state = LOW_THEN_HIGH
            self.load(self.write_latch | value << 8, now)
        else:
            self.load(value << 8 if self.write_state == HIGH else value, now)
        return True

    def set_gate(self, gate: int, now: int) -> bool:
        """Sets the GATE input; true if that has restarted the counter."""
        restarts = gate > self.gate and self.mode not in (TERMINAL_COUNT, SOFTWARE_STROBE)
        self.gate = gate
        if restarts:
            self.load(self.count, now)
        return restarts


class I8254(IrqchipDevice):
    """The timer.  With an in-kernel PIT, `channels` has its state while the VM is stopped."""

    idstr = "i8254"
    vmstate = VMStateDescription(
        "i8254",
        3,
        2,
        (
            u32("channels[0].irq_disabled"),
            struct_("channels", VMSTATE_CHANNEL, 3),
            i64("channels[0].next_transition_time"),
        ),
    )

    def __init__(self) -> None:
        self.channels = [Channel() for _ in range(3)]
        self.irq_disabled = 0
        self.speaker_data = 0
        self._platform: Platform | None = None
        self._timer: VirtualTimer | None = None

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        if not platform.accel.kernel_irqchip:
            self._timer = VirtualTimer(platform, self._on_transition)
            platform.register_io(BASE, 4, self._read, self._write, "pit")

    def unrealize(self) -> None:
        if self._timer is not None and self._platform is not None:
            self._timer.set(None)
            self._platform.unregister_io(BASE, 4)
        self._timer = None
        self._platform = None

    def reset(self) -> None:
        for number, channel in enumerate(self.channels):
            channel.reset(self.now(), number != 2)
        self.irq_disabled = 0
        self._set_timer()
        if self.of_accel:
            self.load_into_kernel()

    def save(self) -> dict:
        if self.of_accel:
            self._take_from_kernel()
        return {
            "channels[0].irq_disabled": self.irq_disabled,
            "channels": self._channel_fields(),
            "channels[0].next_transition_time": self.channels[0].next_transition_time,
        }

    def _channel_fields(self) -> list[dict]:
        return [
            {name: getattr(channel, name) for name in Channel.__slots__}
            for channel in self.channels
        ]

    def check(self, state: dict) -> None:
        for number, channel in enumerate(state["channels"]):
            name = f"channels[{number}]"
            check_range(f"{name}.count", channel["count"], 0, MOST_COUNT)
            for field in ("count_load_time", "next_transition_time"):
                check_time(f"{name}.{field}", channel[field])
        field = "channels[0].next_transition_time"
        check_time(field, state[field])

    def restore(self, state: dict) -> None:
        self.irq_disabled = state["channels[0].irq_disabled"]
        for channel, saved in zip(self.channels, state["channels"], strict=True):
            for name in Channel.__slots__:
                setattr(channel, name, saved[name])
            channel.count = channel.count or MOST_COUNT
        self.channels[0].next_transition_time = state["channels[0].next_transition_time"]
        self._set_timer()
        if self.of_accel:
            self.load_into_kernel()

    def on_run(self) -> None:
        if self._timer is not None:
            self._timer.start()

    def on_stop(self) -> None:
        if self._timer is not None:
            self._timer.stop()

    def now(self) -> int:
        return self._platform.clock.now() if self._platform is not None else 0

    def set_gate(self, number: int, gate: int) -> None:
        """Sets the GATE input of a channel."""
        if self.channels[number].set_gate(gate, self.now()) and number == 0:
            self._update_irq(self.now())

    def load_into_kernel(self) -> None:
        """Gives the in-kernel PIT this state; its times are from now."""
        assert self._platform is not None
        now = self.now()
        flags = KVM_HPET_LEGACY if self.irq_disabled else 0
        flags |= KVM_SPEAKER_DATA if self.speaker_data else 0
        channels = self._channel_fields()
        for channel in channels:
            channel["count_load_time"] -= now
        self._platform.accel.set_irqchip("i8254", {"channels": channels, "flags": flags})

    def _take_from_kernel(self) -> None:
        assert self._platform is not None
        state = self._platform.accel.get_irqchip("i8254")
        now = self.now()
        for channel, saved in zip(self.channels, state["channels"], strict=True):
            for name, value in saved.items():
                setattr(channel, name, value)
            channel.count_load_time += now
            channel.next_transition_time = channel.transition_after(now)
        self.irq_disabled = int(bool(state["flags"] & KVM_HPET_LEGACY))
        self.speaker_data = int(bool(state["flags"] & KVM_SPEAKER_DATA))

    def _read(self, offset: int, size: int) -> int:
        if offset == CONTROL:
            return 0
        return self.channels[offset].read(self.now())

    def _write(self, offset: int, size: int, value: int) -> None:
        now = self.now()
        if offset == CONTROL:
            self._write_control(value, now)
        elif self.channels[offset].write(value, now) and offset == 0:
            self._update_irq(now)

    def _write_control(self, value: int, now: int) -> None:
        if value >> 6 == READ_BACK:
            for number, channel in enumerate(self.channels):
                if value & 2 << number:
                    if not value & READ_BACK_NO_COUNT:
                        channel.latch_count(now)
                    if not value & READ_BACK_NO_STATUS:
                        channel.latch_status(now)
        elif value >> 4 & 3 == LATCH:
            self.channels[value >> 6].latch_count(now)
        else:
            self.channels[value >> 6].program(value)

    def _update_irq(self, now: int) -> None:
        """Sets IRQ 0 to what channel 0 puts out, and waits for its next change."""
        assert self._platform is not None
        channel = self.channels[0]
        channel.next_transition_time = channel.transition_after(now)
        self._platform.set_irq(IRQ, channel.output(now) and not self.irq_disabled)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            deadline = self.channels[0].next_transition_time
            self._timer.set(deadline if deadline >= 0 else None)

    def _on_transition(self, deadline: int) -> None:
        assert self._timer is not None and self._platform is not None
        channel = self.channels[0]
        if channel.is_periodic and channel.count * NS_PER_S // FREQUENCY < LEAST_PERIOD_NS:
            self._platform.set_irq(IRQ, not self.irq_disabled)
            self._platform.set_irq(IRQ, False)
            channel.next_transition_time = self.now() + LEAST_PERIOD_NS
            self._set_timer()
        else:
            self._update_irq(self._timer.late(deadline))


class PcSpeaker(Device):
    """Port 0x61 (system control port B): the speaker's bits, silent, around channel 2."""

    idstr = "pcspk"
    vmstate = VMStateDescription("pcspk", 1, 1, (u8("data_on"), u8("dummy_refresh_clock")))

    def __init__(self, pit: I8254) -> None:
        self._pit = pit
        self._refresh = 0
        self._platform: Platform | None = None

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        if not platform.accel.kernel_irqchip:
            platform.register_io(SPEAKER_PORT, 1, self._read, self._write, "pcspk")

    def unrealize(self) -> None:
        if self._platform is not None and not self._platform.accel.kernel_irqchip:
            self._platform.unregister_io(SPEAKER_PORT, 1)
        self._platform = None

    def reset(self) -> None:
        self._pit.speaker_data = 0
        self._refresh = 0
        self._pit_changed()

    def save(self) -> dict:
        return {"data_on": self._pit.speaker_data, "dummy_refresh_clock": self._refresh}

    def restore(self, state: dict) -> None:
        self._pit.speaker_data = state["data_on"]
        self._refresh = state["dummy_refresh_clock"]
        self._pit_changed()

    def _pit_changed(self) -> None:
        if self._pit.of_accel:
            self._pit.load_into_kernel()

    def _read(self, offset: int, size: int) -> int:
        channel = self._pit.channels[2]
        self._refresh ^= 1
        value = GATE_2 if channel.gate else 0
        value |= SPEAKER_DATA if self._pit.speaker_data else 0
        value |= REFRESH if self._refresh else 0
        value |= OUT_2 if channel.output(self._pit.now()) else 0
        return value

    def _write(self, offset: int, size: int, value: int) -> None:
        self._pit.speaker_data = int(bool(value & SPEAKER_DATA))
        self._pit.set_gate(2, value & GATE_2)
