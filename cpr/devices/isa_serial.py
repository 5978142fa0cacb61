"""isa-serial, the card with a 16550 on it, and the board's own COM ports."""

from __future__ import annotations

from cpr.devices.serial import PORTS, Serial
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config import DeviceConfig
    from cpr.devices.board import Board, BoardMachine


def add(
    machine: BoardMachine, index: int, chardev: str | None, port: int | None = None, irq: int = 0
) -> None:
    """COM1 for index 0 and so on, unless `port` and `irq` say otherwise.  Raises ConfigError."""
    if index >= len(PORTS):
        raise ConfigError(f"Max. supported number of ISA serial ports is {len(PORTS)}.")
    serial = Serial(index, port, irq)
    machine.add_device(serial)
    machine.frontends.append((serial, chardev))


def create(board: Board, config: DeviceConfig) -> None:
    machine, properties = board.machine, config.properties
    used = {device.instance_id for device in machine.devices if device.idstr == Serial.idstr}
    free = [index for index in range(len(PORTS)) if index not in used]
    index = properties.get("index", free[0] if free else len(PORTS))
    chardev, port = properties.get("chardev"), properties.get("iobase")
    add(machine, index, chardev, port, properties.get("irq", 0))
