"""A machine for device tests: it records interrupt lines and requests, and has a real bus.

FakePlatform's clock and main loop are real; those of SteppedPlatform are advanced by the test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from cpr.bus import IOBus, Region
from cpr.clock import VirtualClock
from cpr.errors import CprError
from cpr.events import EventBus
from cpr.mainloop import MainLoop
from cpr.memory import GuestMemory


class FakePlatform:
    """devices.base.Platform without vCPUs.

    `irqs` are all changes of interrupt lines, `lines` what each is now.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.loop: Any = MainLoop()
        self.clock: Any = VirtualClock()
        self.clock.enable()
        self.events = EventBus()
        self.accel: Any = None
        self.memory = GuestMemory()
        self.suspended = False
        self.errors: list[CprError] = []
        self.vcpus: list[Any] = []
        self.bus = IOBus(self.lock)
        self.irqs: list[tuple[int, bool]] = []
        self.irq_handlers: list[Callable[[int, bool], None]] = []
        self.lines: dict[int, bool] = {}
        self.requests: list[tuple] = []

    def register_io(
        self, base: int, length: int, read: Any, write: Any, name: str, access_size: int = 1
    ) -> None:
        self.bus.io.add(Region(base, length, read, write, name, access_size))

    def register_mmio(
        self, base: int, length: int, read: Any, write: Any, name: str, access_size: int = 4
    ) -> None:
        self.bus.memory.add(Region(base, length, read, write, name, access_size))

    def unregister_io(self, base: int, length: int) -> None:
        self.bus.io.remove(base, length)

    def unregister_mmio(self, base: int, length: int) -> None:
        self.bus.memory.remove(base, length)

    def set_irq(self, gsi: int, level: bool) -> None:
        self.lines[gsi] = level
        self.irqs.append((gsi, level))
        for handler in self.irq_handlers:
            handler(gsi, level)

    def current_vcpu(self) -> int:
        return -1

    def request_shutdown(self, guest: bool, reason: str) -> None:
        self.requests.append(("shutdown", guest, reason))

    def request_suspend(self) -> None:
        self.requests.append(("suspend",))

    def request_reset(self, guest: bool, reason: str) -> None:
        self.requests.append(("reset", guest, reason))

    def request_error(self, error: CprError) -> None:
        self.errors.append(error)

    def keeps_vcpus_away(self) -> bool:
        """Whether the caller has the lock, so that no vCPU gets to a device."""
        got: list[bool] = []

        def try_lock() -> None:
            got.append(self.lock.acquire(blocking=False))
            if got[0]:
                self.lock.release()

        vcpu = threading.Thread(target=try_lock)
        vcpu.start()
        vcpu.join()
        return not got[0]

    def request_exit(self, status: int) -> None:
        self.requests.append(("exit", status))


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

    def forget_code(self) -> None:
        pass

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


class SteppedPlatform(FakePlatform):
    """With `vcpus`, of which `vcpu` makes the accesses."""

    def __init__(self, kernel_irqchip: bool = False, vcpus: int = 1) -> None:
        super().__init__()
        self.loop.close()
        self.clock = SteppedClock()
        self.loop = SteppedLoop(self.clock)
        self.accel = FakeAccelerator(kernel_irqchip)
        self.vcpus = [FakeVCpu(index) for index in range(vcpus)]
        self.vcpu = 0

    def current_vcpu(self) -> int:
        return self.vcpu

    def inb(self, port: int) -> int:
        return self.bus.io_read(port, 1)

    def outb(self, port: int, *values: int) -> None:
        for value in values:
            self.bus.io_write(port, 1, value)

    def readl(self, address: int) -> int:
        return self.bus.mmio_read(address, 4)

    def writel(self, address: int, value: int) -> None:
        self.bus.mmio_write(address, 4, value)
