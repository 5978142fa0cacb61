"""isa-debugcon: bytes that the guest writes to a port go to a chardev."""

from __future__ import annotations

from contextlib import nullcontext

from cpr.devices.base import MAX_UNATTACHED, Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.chardev.base import Chardev
    from cpr.config import DeviceConfig
    from cpr.devices.base import Platform
    from cpr.devices.board import Board

PORT = 0xE9
READBACK = 0xE9


class DebugCon(Device):
    """The chardev is attached later and stays the caller's; see Serial.attach."""

    def __init__(self, port: int = PORT, readback: int = READBACK) -> None:
        self.port = port
        self._readback = readback
        self._platform: Platform | None = None
        self._chardev: Chardev | None = None
        self._unattached: bytearray | None = bytearray()

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        platform.register_io(self.port, 1, self._read, self._write, "isa-debugcon")

    def unrealize(self) -> None:
        if self._platform is not None:
            self._platform.unregister_io(self.port, 1)
            self._platform = None

    def attach(self, chardev: Chardev | None) -> None:
        with self._platform.lock if self._platform is not None else nullcontext():
            written, self._unattached = self._unattached, None
            self._chardev = chardev
            if chardev is not None and written:
                chardev.write(bytes(written))

    def detach(self) -> None:
        self._chardev = None
        self._unattached = bytearray()

    def _read(self, offset: int, size: int) -> int:
        return self._readback

    def _write(self, offset: int, size: int, value: int) -> None:
        if self._chardev is not None:
            self._chardev.write(bytes([value & 0xFF]))
        elif self._unattached is not None and len(self._unattached) < MAX_UNATTACHED:
            self._unattached.append(value & 0xFF)


def create(board: Board, config: DeviceConfig) -> None:
    properties = config.properties
    device = DebugCon(properties.get("iobase", PORT), properties.get("readback", READBACK))
    board.machine.add_device(device)
    board.machine.frontends.append((device, properties["chardev"]))
