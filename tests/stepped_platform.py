"""A machine for the tests of devices, with a clock and a main loop that the test advances."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from cpr.events import EventBus


class SteppedClock:
    """The virtual clock; its time is also the main loop's."""

    def __init__(self) -> None:
        self.enabled = True
        self.time = 0

    def now(self) -> int:
        return self.time

    def to_monotonic(self, guest_ns: int) -> int:
        return guest_ns


class SteppedTimer:
    def __init__(self, deadline: int, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SteppedLoop:
    def __init__(self, clock: SteppedClock) -> None:
        self._clock = clock
        self.timers: list[SteppedTimer] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_at(self._clock.time, callback)

    def call_at(self, deadline: int, callback: Callable[[], None]) -> SteppedTimer:
        self.timers.append(SteppedTimer(deadline, callback))
        return self.timers[-1]

    def armed(self) -> list[int]:
        return sorted(timer.deadline for timer in self.timers if timer.callback is not None)

    def advance(self, time: int) -> None:
        """Lets time go on until `time`, running each timer when it is due."""
        while self.armed() and self.armed()[0] <= time:
            due = min((t for t in self.timers if t.callback), key=lambda t: t.deadline)
            self._clock.time = max(self._clock.time, due.deadline)
            self.fire(due)
        self._clock.time = time

    def fire(self, timer: SteppedTimer) -> None:
        self.timers.remove(timer)
        callback = timer.callback
        assert callback is not None
        timer.callback = None
        callback()


class FakeVCpu:
    def __init__(self, index: int) -> None:
        self.index = index
        self.calls: list[Any] = []

    def interrupt(self) -> None:
        self.calls.append("interrupt")

    def init(self) -> None:
        self.calls.append("init")

    def sipi(self, vector: int) -> None:
        self.calls.append(("sipi", vector))


class FakeAccelerator:
    """With an irqchip it keeps what is set; `chips` and `apics` are what a kernel would have."""

    def __init__(self, kernel_irqchip: bool) -> None:
        self.kernel_irqchip = kernel_irqchip
        self.chips: dict[str, dict] = {}
        self.apics: dict[int, bytes] = {}

    def get_irqchip(self, chip: str) -> dict:
        return self.chips[chip]

    def set_irqchip(self, chip: str, state: dict) -> None:
        self.chips[chip] = state

    def get_apic(self, vcpu: FakeVCpu) -> bytes:
        return self.apics[vcpu.index]

    def set_apic(self, vcpu: FakeVCpu, registers: bytes) -> None:
        self.apics[vcpu.index] = registers


class SteppedPlatform:
    """Records interrupt lines in `irqs`; `vcpu` is which vCPU makes the accesses."""

    def __init__(self, kernel_irqchip: bool = False, vcpus: int = 1) -> None:
        self.lock = threading.RLock()
        self.clock = SteppedClock()
        self.loop = SteppedLoop(self.clock)
        self.events = EventBus()
        self.accel = FakeAccelerator(kernel_irqchip)
        self.vcpus = [FakeVCpu(index) for index in range(vcpus)]
        self.vcpu = 0
        self.irqs: list[tuple[int, bool]] = []
        self.irq_handlers: list[Callable[[int, bool], None]] = []
        self.io: dict[int, tuple] = {}
        self.mmio: dict[int, tuple] = {}

    def register_io(
        self, base: int, length: int, read: Any, write: Any, name: str, access_size: int = 1
    ) -> None:
        for offset in range(length):
            assert base + offset not in self.io
            self.io[base + offset] = (offset, read, write)

    def unregister_io(self, base: int, length: int) -> None:
        for offset in range(length):
            del self.io[base + offset]

    def register_mmio(
        self, base: int, length: int, read: Any, write: Any, name: str, access_size: int = 4
    ) -> None:
        assert base not in self.mmio
        self.mmio[base] = (length, read, write)

    def unregister_mmio(self, base: int, length: int) -> None:
        assert self.mmio.pop(base)[0] == length

    def set_irq(self, gsi: int, level: bool) -> None:
        self.irqs.append((gsi, level))
        for handler in self.irq_handlers:
            handler(gsi, level)

    def current_vcpu(self) -> int:
        return self.vcpu

    def inb(self, port: int) -> int:
        offset, read, _ = self.io[port]
        return read(offset, 1)

    def outb(self, port: int, *values: int) -> None:
        offset, _, write = self.io[port]
        for value in values:
            write(offset, 1, value)

    def readl(self, address: int) -> int:
        base, (_, read, _) = self._mmio_region(address)
        return read(address - base, 4)

    def writel(self, address: int, value: int) -> None:
        base, (_, _, write) = self._mmio_region(address)
        write(address - base, 4, value)

    def _mmio_region(self, address: int) -> tuple[int, tuple]:
        for base, region in self.mmio.items():
            if base <= address < base + region[0]:
                return base, region
        raise AssertionError(f"nothing is at {address:#x}")
