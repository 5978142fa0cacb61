"""isa-debug-exit: the guest ends the VMM by a write to a port."""

from __future__ import annotations

from cpr.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config import DeviceConfig
    from cpr.devices.base import Platform
    from cpr.devices.board import Board

PORT = 0x501
SIZE = 2


class DebugExit(Device):
    """A write of `value` ends the VMM with status (value << 1) | 1."""

    def __init__(self, port: int = PORT, size: int = SIZE) -> None:
        self.port = port
        self.size = size
        self._platform: Platform | None = None

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        platform.register_io(
            self.port, self.size, self._read, self._write, "isa-debug-exit", access_size=self.size
        )

    def unrealize(self) -> None:
        if self._platform is not None:
            self._platform.unregister_io(self.port, self.size)
            self._platform = None

    def _read(self, offset: int, size: int) -> int:
        return 0

    def _write(self, offset: int, size: int, value: int) -> None:
        if self._platform is not None:
            self._platform.request_exit((value << 1 | 1) & 0xFF)


def create(board: Board, config: DeviceConfig) -> None:
    properties = config.properties
    board.machine.add_device(
        DebugExit(properties.get("iobase", PORT), properties.get("iosize", SIZE))
    )
