"""virtio-balloon-pci: a guest gives pages back to the host, and takes them again (virtio 1.2, 5.5).

Pages that the guest has put into the balloon are holes in its RAM afterwards.  Where a device of
the host may have mapped RAM for its DMA they are left as they are, as with QEMU.
"""

from __future__ import annotations

import time

from cpr.constants import NS_PER_MS, NS_PER_S, PAGE_SIZE
from cpr.devices.virtio.device import VirtioDevice
from cpr.devices.virtio.pci import add_function
from cpr.errors import CommandError, ConfigError
from cpr.state.vmstate import VMStateDescription, u32
from cpr.uapi import virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.config import DeviceConfig
    from cpr.devices.board import Board
    from cpr.devices.virtio.device import Transport

QUEUE_SIZE = 128
TURN_NS = 5 * NS_PER_MS  # with the machine's lock
INFLATE = 0
ARRAY_BYTES = 4 << 10  # of page numbers, 4 bytes each, in one chain; Linux gives 1 KiB
ACTUAL_OFFSET = 4
OTHER = 0x00FF00

VMSTATE_BALLOON = VMStateDescription(
    "virtio-balloon-device", 1, 1, (u32("num_pages"), u32("actual"))
)


class VirtioBalloon(VirtioDevice):
    """A balloon in a guest with `ram_size` bytes.

    `is_inhibited()` says that pages must stay; `deflates`: the guest may take pages when it is
    short of memory.
    """

    name = "virtio-balloon"
    is_balloon = True
    device_id = virtio.ID_BALLOON
    pci_class = OTHER
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)
    vmstate = VMSTATE_BALLOON

    def __init__(
        self, ram_size: int, is_inhibited: Callable[[], bool], deflates: bool = False
    ) -> None:
        self._ram_size = ram_size
        self._is_inhibited = is_inhibited
        self._wanted = self._pages = 0  # in the balloon, as the host wants and as the guest says
        self._changed = self._has_told = False
        self.features = virtio.BALLOON_F_DEFLATE_ON_OOM if deflates else 0

    def realize(self, transport: Transport) -> None:
        self.transport = transport

    @property
    def actual(self) -> int:
        """Bytes that the guest has for itself."""
        return self._ram_size - self._pages * PAGE_SIZE

    def set_target(self, size: int) -> None:
        """Asks the guest to have `size` bytes for itself.  Raises CommandError."""
        if size <= 0:
            raise CommandError("Parameter 'value' expects a size")
        self._wanted = (self._ram_size - min(size, self._ram_size)) // PAGE_SIZE
        self.transport.config_changed()

    def config_read(self, offset: int, size: int) -> int:
        config = self._wanted | self._pages << 32  # num_pages, actual
        return config >> 8 * offset & (1 << 8 * size) - 1

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset != ACTUAL_OFFSET or size != 4:
            return
        before, self._pages = self._pages, min(value, self._ram_size // PAGE_SIZE)
        if self._pages != before:
            self._changed = True
            self._tell()

    def _tell(self) -> None:
        """At most one event a second, as in QEMU: the guest says how often it has changed."""
        if self._changed and not self._has_told:
            self._changed, self._has_told = False, True
            platform = self.transport.platform
            platform.events.emit("BALLOON_CHANGE", {"actual": self.actual})
            platform.loop.call_later(NS_PER_S, self._tell_again)

    def _tell_again(self) -> None:
        with self.transport.platform.lock:
            self._has_told = False
            self._tell()

    def start(self) -> None:
        for index in range(len(self.queue_sizes)):
            self.kick(index)

    def kick(self, index: int) -> None:
        """Pages become holes before the guest is told that they are taken, and may want them."""
        queue, memory = self.transport.queues[index], self.transport.platform.memory
        end = time.monotonic_ns() + TURN_NS
        while time.monotonic_ns() < end:
            numbers = queue.peek(ARRAY_BYTES)
            if numbers is None:
                return
            if index == INFLATE and not self._is_inhibited():
                for first, count in runs(numbers):
                    memory.discard(first * PAGE_SIZE, count * PAGE_SIZE)
            queue.receive(ARRAY_BYTES)
        self.kick_again(index)

    def save(self) -> dict:
        return {"num_pages": self._wanted, "actual": self._pages}

    def check(self, state: dict) -> None:
        if max(state["num_pages"], state["actual"]) > self._ram_size // PAGE_SIZE:
            raise ValueError("there are more pages in the balloon than there is RAM")

    def restore(self, state: dict) -> None:
        self._wanted, self._pages = state["num_pages"], state["actual"]


def runs(data: bytes) -> Iterator[tuple[int, int]]:
    """(first, count) of consecutive numbers in an array of 32-bit ones, in any order."""
    numbers = sorted(set(memoryview(data[: len(data) & ~3]).cast("I")))
    start = 0
    for index, number in enumerate(numbers):
        if index + 1 == len(numbers) or numbers[index + 1] != number + 1:
            yield numbers[start], index + 1 - start
            start = index + 1


def create(board: Board, config: DeviceConfig) -> None:
    """Makes the device of -device virtio-balloon-pci.  Raises CprError."""
    machine = board.machine
    if any(device.balloon is not None for device in machine.devices):
        raise ConfigError("Only one balloon device is supported")

    def is_inhibited() -> bool:
        return any(device.maps_ram for device in machine.devices)

    properties = config.properties
    balloon = VirtioBalloon(
        board.ram_size, is_inhibited, bool(properties.get("deflate-on-oom", False))
    )
    add_function(board, balloon, properties)
