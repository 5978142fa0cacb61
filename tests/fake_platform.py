"""A machine for device tests: it records interrupt lines and requests, and has a real bus."""

from __future__ import annotations

import threading
from typing import Any

from cpr.bus import IOBus, Region
from cpr.clock import VirtualClock
from cpr.errors import CprError
from cpr.events import EventBus
from cpr.mainloop import MainLoop
from cpr.memory import GuestMemory


class FakePlatform:
    """devices.base.Platform without vCPUs."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.loop = MainLoop()
        self.clock = VirtualClock()
        self.clock.enable()
        self.events = EventBus()
        self.accel: Any = None
        self.memory = GuestMemory()
        self.suspended = False
        self.errors: list[CprError] = []
        self.vcpus: list[Any] = []
        self.bus = IOBus(self.lock)
        self.irqs: dict[int, bool] = {}
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
        self.irqs[gsi] = level

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

    def request_exit(self, status: int) -> None:
        self.requests.append(("exit", status))
