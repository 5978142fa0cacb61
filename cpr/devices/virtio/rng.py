"""virtio-rng-pci: random bytes of the host's kernel for the guest (virtio 1.2, 5.4)."""

from __future__ import annotations

from cpr.devices.virtio.device import VirtioDevice
from cpr.devices.virtio.pci import add_function
from cpr.errors import ConfigError
from cpr.uapi import virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config import DeviceConfig
    from cpr.devices.board import Board
    from cpr.mainloop import Timer

QUEUE_SIZE = 8
MOST_BYTES = 64 << 10  # of one buffer: the guest waits meanwhile
OTHER = 0x00FF00
MS = 1_000_000
DEFAULT_PERIOD = 1 << 16  # ms


class VirtioRng(VirtioDevice):
    """With `max_bytes`, at most so many in each `period` of ms; the guest waits for the rest."""

    name = "virtio-rng"
    device_id = virtio.ID_RNG
    pci_class = OTHER
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, max_bytes: int | None = None, period: int = DEFAULT_PERIOD) -> None:
        self._max_bytes = max_bytes
        self._period = period
        self._timer: Timer | None = None
        self._left = 0
        self._runs = False

    def start(self) -> None:
        self._runs = True
        self._begin_period()

    def stop(self) -> None:
        self._runs = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_period(self) -> None:
        self._timer = None
        self._left = MOST_BYTES if self._max_bytes is None else self._max_bytes
        self.kick(0)

    def kick(self, index: int) -> None:
        (queue,) = self.transport.queues
        for _ in range(QUEUE_SIZE):
            if not self._runs or self._left <= 0:
                break
            count = queue.send_random(min(MOST_BYTES, self._left))
            if count < 0:
                return
            if self._max_bytes is not None:
                self._left -= count
        else:
            self.kick_again(0)
            return
        if self._runs and self._timer is None:
            delay = self._period * MS
            self._timer = self.transport.platform.loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        with self.transport.platform.lock:
            if self._timer is not None:
                self._begin_period()


def create(board: Board, config: DeviceConfig) -> None:
    """Makes the device of -device virtio-rng-pci.  Raises CprError."""
    properties = config.properties
    period = properties.get("period", DEFAULT_PERIOD)
    if period <= 0:
        raise ConfigError("'period' parameter expects a positive integer")
    add_function(board, VirtioRng(properties.get("max-bytes"), period), properties)
