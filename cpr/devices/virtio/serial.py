"""virtio-serial-pci and its one port, a virtconsole (virtio 1.2, 5.3).

What the guest writes before there is a chardev stays in its queue, so that nothing has to be saved.
A peer that does not read does not hold the guest up: Linux waits for its console with a lock held,
and all of it would stand still.  The chardev keeps the output as far as it does for anybody.
"""

from __future__ import annotations

from cpr.devices.virtio.device import VirtioDevice
from cpr.devices.virtio.pci import VirtioPci, add_function
from cpr.errors import ConfigError
from cpr.uapi import virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.chardev.base import Chardev
    from cpr.config import DeviceConfig
    from cpr.devices.board import Board

QUEUE_SIZE = 128
RECEIVE, TRANSMIT = 0, 1
MOST_OUTPUT = 64 << 10  # bytes of one buffer of the guest's
COMMUNICATION = 0x078000


class VirtioSerial(VirtioDevice):
    """One port without the control queues: its driver makes it hvc0.

    `is_taken` says that there is a virtconsole; without one what the guest writes is dropped.
    The chardev is attached later and stays the caller's.
    """

    name = "virtio-console"
    device_id = virtio.ID_CONSOLE
    pci_class = COMMUNICATION
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self) -> None:
        self.is_taken = False
        self._runs = False
        self._chardev: Chardev | None = None
        self._waits_for_chardev = False

    def take(self) -> None:
        """There will be an `attach`."""
        self.is_taken = self._waits_for_chardev = True

    def attach(self, chardev: Chardev | None) -> None:
        """As of Serial.attach: None says that there will be no chardev."""
        with self.transport.platform.lock:
            self._waits_for_chardev = False
            self._chardev = chardev
            if chardev is not None:
                chardev.set_handlers(self._can_receive, self._on_receive, lambda event: None)
            self._transmit()

    def start(self) -> None:
        self._runs = True
        for index in (RECEIVE, TRANSMIT):
            self.kick(index)

    def stop(self) -> None:
        self._runs = False

    def kick(self, index: int) -> None:
        if index == TRANSMIT:
            self._transmit()
        elif self._chardev is not None:
            self._chardev.accept_input()

    def _transmit(self) -> None:
        queue = self.transport.queues[TRANSMIT]
        for _ in range(QUEUE_SIZE):
            if not self._runs or self._waits_for_chardev:
                return
            data = queue.receive(MOST_OUTPUT)
            if data is None:
                return
            if self._chardev is not None:
                self._chardev.write(data)
        self.kick_again(TRANSMIT)

    def _can_receive(self) -> int:
        with self.transport.platform.lock:
            return self.transport.queues[RECEIVE].room() if self._runs else 0

    def _on_receive(self, data: bytes) -> None:
        with self.transport.platform.lock:
            self.transport.queues[RECEIVE].send(data)


def create(board: Board, config: DeviceConfig) -> None:
    """Makes the bus of -device virtio-serial-pci.  Raises CprError."""
    add_function(board, VirtioSerial(), config.properties)


def create_console(board: Board, config: DeviceConfig) -> None:
    """Makes the port of -device virtconsole, on the first bus without.  Raises ConfigError."""
    buses = [
        function.device
        for function in board.machine.devices
        if isinstance(function, VirtioPci) and isinstance(function.device, VirtioSerial)
    ]
    if not buses:
        raise ConfigError(
            "No 'virtio-serial-bus' bus found for device 'virtconsole': give "
            "-device virtio-serial-pci before it"
        )
    free = next((bus for bus in buses if not bus.is_taken), None)
    if free is None:
        raise ConfigError("a virtio-serial-pci has one port here: give another one before it")
    free.take()
    board.machine.frontends.append((free, config.properties.get("chardev")))
