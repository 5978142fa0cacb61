"""A driver for virtio devices over PCI, as a guest's: for tests that have the device in-process.

It finds the function by mechanism 1, places its BARs, and has its queues in guest RAM.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

from fake_platform import FakePlatform
from waiting import TIMEOUT

from cpr.config import ObjectConfig
from cpr.memory import GuestMemory
from cpr.ram import RAMBlock
from cpr.ram_backend import create_backend_block
from cpr.state.fds import PreservedFds

RAM_SIZE = 4 << 20
ROM_ADDRESS = 0x80000000
BAR_BASE = 0xF0000000
NEXT, WRITE, INDIRECT = 1, 2, 4
F_VERSION_1, F_EVENT_IDX, F_INDIRECT = 1 << 32, 1 << 29, 1 << 28
RESET, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK = 0, 1, 2, 8, 4
NEEDS_RESET = 0x40
MSI_ADDRESS = 0xFEE00000

Piece = tuple[int, int, bool]  # address, size, whether the device writes it


class FakeAccel:
    has_irqfds = ioeventfds = False

    def write_listener(self) -> tuple[int, int] | None:
        return None


class VirtioPlatform(FakePlatform):
    """A FakePlatform with RAM from 0 on, and a read-only page at ROM_ADDRESS.

    `messages` are the MSIs that came, `stops` the run states that devices have stopped the VM in.
    """

    def __init__(self, accel: Any = None) -> None:
        super().__init__()
        self.accel = accel or FakeAccel()
        self.memory = GuestMemory()
        self.ram = _block("ram0", RAM_SIZE)
        rom = _block("rom", 4096)
        self.memory.add_block(self.ram)
        self.memory.add_block(rom)
        half = RAM_SIZE // 2  # two sections that meet, as below and above the BIOS
        self.memory.add_section(0, half, self.ram, 0, False, "low")
        self.memory.add_section(half, half, self.ram, half, False, "high")
        self.memory.add_section(ROM_ADDRESS, 4096, rom, 0, True, "rom")
        self.messages: list[tuple[int, int]] = []
        self.stops: list[str] = []

    def signal_message(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def request_stop(self, state: str) -> None:
        self.stops.append(state)

    def wait(self, condition: Callable[[], Any]) -> None:
        """Runs the main loop until `condition()`."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            self.loop.iterate(10_000_000)

    def close(self) -> None:
        self.memory.close()
        self.loop.close()


def _block(name: str, size: int) -> RAMBlock:
    properties = {"size": size, "share": True}
    return create_backend_block(
        ObjectConfig("memory-backend-memfd", name, properties), PreservedFds()
    )


class RingState:
    """One queue of the driver's, of `size` descriptors, at `base` of guest RAM."""

    def __init__(self, driver: Driver, index: int, base: int, size: int) -> None:
        self.driver = driver
        self.index = index
        self.size = size
        self.descriptors = base
        self.available = base + 16 * size
        self.used = base + 0x8000
        self.next_available = 0
        self.next_used = 0
        self.next_descriptor = 0
        driver.write(base, bytes(0x10000))

    def put(self, number: int, piece: Piece, flags: int = 0, following: int = 0) -> None:
        address, size, writes = piece
        flags |= WRITE if writes else 0
        data = struct.pack("<QIHH", address, size, flags, following)
        self.driver.write(self.descriptors + 16 * number, data)

    def add(self, pieces: list[Piece]) -> int:
        """Makes a chain of descriptors, and makes it available; returns its head."""
        numbers = [(self.next_descriptor + i) % self.size for i in range(len(pieces))]
        self.next_descriptor = (self.next_descriptor + len(pieces)) % self.size
        for position, (number, piece) in enumerate(zip(numbers, pieces, strict=True)):
            last = position == len(pieces) - 1
            self.put(number, piece, 0 if last else NEXT, 0 if last else numbers[position + 1])
        self.offer(numbers[0])
        return numbers[0]

    def offer(self, head: int) -> None:
        place = self.available + 4 + 2 * (self.next_available % self.size)
        self.driver.write(place, struct.pack("<H", head))
        self.next_available = self.next_available + 1 & 0xFFFF
        self.driver.write(self.available + 2, struct.pack("<H", self.next_available))

    def kick(self) -> None:
        self.driver.notify(self.index)

    @property
    def used_index(self) -> int:
        value: int = struct.unpack("<H", self.driver.read(self.used + 2, 2))[0]
        return value

    def take_used(self) -> tuple[int, int] | None:
        """(head, bytes written) of the next chain that was given back."""
        if self.used_index == self.next_used:
            return None
        place = self.used + 4 + 8 * (self.next_used % self.size)
        head, written = struct.unpack("<II", self.driver.read(place, 8))
        self.next_used = self.next_used + 1 & 0xFFFF
        return head, written

    def wait_used(self) -> tuple[int, int]:
        self.driver.platform.wait(lambda: self.used_index != self.next_used)
        found = self.take_used()
        assert found is not None
        return found


class Driver:
    """The device in PCI `slot` of `platform`, with its BARs at `base`; 0 for nowhere."""

    def __init__(
        self, platform: VirtioPlatform, slot: int = 1, base: int = BAR_BASE + (1 << 16)
    ) -> None:
        self.platform = platform
        self.slot = slot
        self.queues: list[RingState] = []
        self.capabilities: dict[int, int] = {}
        self.place_bars(base)

    def config(self, offset: int, size: int, value: int | None = None) -> int:
        bus = self.platform.bus
        bus.io_write(0xCF8, 4, 1 << 31 | self.slot << 11 | offset & 0xFC)
        if value is None:
            return bus.io_read(0xCFC + offset % 4, size)
        bus.io_write(0xCFC + offset % 4, size, value)
        return value

    def place_bars(self, base: int) -> None:
        self.config(0x14, 4, base)
        self.config(0x20, 4, base and base + 0x8000)
        self.config(0x24, 4, 0)
        self.config(4, 2, 6)
        self.msix_base = self.config(0x14, 4) & ~0xF
        base = self.config(0x20, 4) & ~0xF
        offset = self.config(0x34, 1)
        while offset:
            if self.config(offset, 1) == 9:
                self.capabilities[self.config(offset + 3, 1)] = base + self.config(offset + 8, 4)
            else:
                self.msix = offset
            offset = self.config(offset + 1, 1)

    def read(self, address: int, size: int) -> bytes:
        return self.platform.memory.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        self.platform.memory.write(address, data)

    def common(self, offset: int, size: int, value: int | None = None) -> int:
        place = self.capabilities[1] + offset
        if value is None:
            return self.platform.bus.mmio_read(place, size)
        self.platform.bus.mmio_write(place, size, value)
        return value

    def own(self, offset: int, size: int) -> int:
        return self.platform.bus.mmio_read(self.capabilities[4] + offset, size)

    @property
    def status(self) -> int:
        return self.common(20, 1)

    def offered(self) -> int:
        self.common(0, 4, 0)
        low = self.common(4, 4)
        self.common(0, 4, 1)
        return low | self.common(4, 4) << 32

    def negotiate(self, features: int) -> None:
        self.common(20, 1, RESET)
        self.common(20, 1, ACKNOWLEDGE | DRIVER)
        for half in (0, 1):
            self.common(8, 4, half)
            self.common(12, 4, features >> 32 * half & 0xFFFFFFFF)
        self.common(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)

    def start(
        self, features: int = F_VERSION_1, sizes: tuple[int, ...] = (16,), msix: bool = True
    ) -> None:
        """Brings the device up, with queues at 1 MiB, each with a vector of its own if `msix`."""
        self.negotiate(features)
        assert self.status & FEATURES_OK
        if msix:
            self.config(self.msix + 2, 2, 0x8000)
            for vector in range(len(sizes) + 1):
                self.set_vector(vector, 0x40 + vector)
            self.common(16, 2, 0)
        self.queues = []
        for index, size in enumerate(sizes):
            ring = RingState(self, index, (1 << 20) + 0x10000 * index, size)
            self.queues.append(ring)
            self.place_queue(ring, index + 1 if msix else 0xFFFF)
        self.common(20, 1, self.status | DRIVER_OK)

    def place_queue(self, ring: RingState, vector: int = 0xFFFF) -> None:
        self.common(22, 2, ring.index)
        self.common(24, 2, ring.size)
        self.common(26, 2, vector)
        for offset, address in ((32, ring.descriptors), (40, ring.available), (48, ring.used)):
            self.common(offset, 4, address & 0xFFFFFFFF)
            self.common(offset + 4, 4, address >> 32)
        self.common(28, 2, 1)

    def set_vector(self, vector: int, data: int, masked: bool = False) -> None:
        entry = self.msix_base + 16 * vector
        for offset, value in ((0, MSI_ADDRESS), (4, 0), (8, data), (12, int(masked))):
            self.platform.bus.mmio_write(entry + offset, 4, value)

    def notify(self, index: int) -> None:
        self.platform.bus.mmio_write(self.capabilities[2] + 4 * index, 2, index)
