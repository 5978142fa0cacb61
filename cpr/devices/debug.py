"""Debug ports: isa-debugcon writes bytes to a chardev, isa-debug-exit ends the VMM."""

from __future__ import annotations

from cpr.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.chardev.base import Chardev
    from cpr.devices.base import Platform

DEBUGCON_PORT = 0xE9
DEBUGCON_READBACK = 0xE9
MAX_UNATTACHED = 64 << 10  # bytes that are kept for a chardev which is still to come
EXIT_PORT = 0x501
EXIT_SIZE = 2


class DebugCon(Device):
    """isa-debugcon.  The chardev is attached later and stays the caller's; see Serial.attach."""

    def __init__(self, port: int = DEBUGCON_PORT, readback: int = DEBUGCON_READBACK) -> None:
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


class DebugExit(Device):
    """isa-debug-exit: a write of `value` ends the VMM with status (value << 1) | 1."""

    def __init__(self, port: int = EXIT_PORT, size: int = EXIT_SIZE) -> None:
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
