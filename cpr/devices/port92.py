"""System control port A (0x92): fast A20 gate in bit 1, fast reset in bit 0."""

from __future__ import annotations

from cpr.devices.base import Device
from cpr.state.vmstate import VMStateDescription, u8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.acpi.tables import Acpi
    from cpr.devices.base import Platform

PORT = 0x92
FAST_RESET = 0x01
A20 = 0x02


class Port92(Device):
    """The A20 gate is kept as state only: no accelerator masks address line 20."""

    idstr = "port92"
    vmstate = VMStateDescription("port92", 1, 1, (u8("outport"),))

    def __init__(self) -> None:
        self._platform: Platform | None = None
        self._outport = 0

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        platform.register_io(PORT, 1, self._read, self._write, "port92")

    def unrealize(self) -> None:
        if self._platform is not None:
            self._platform.unregister_io(PORT, 1)
            self._platform = None

    def describe(self, acpi: Acpi) -> None:
        acpi.set_reset_register(PORT, FAST_RESET)

    def reset(self) -> None:
        self._outport &= ~FAST_RESET

    def save(self) -> dict:
        return {"outport": self._outport}

    def restore(self, state: dict) -> None:
        self._outport = state["outport"]

    def _read(self, offset: int, size: int) -> int:
        return self._outport

    def _write(self, offset: int, size: int, value: int) -> None:
        rising = value & ~self._outport
        self._outport = value & 0xFF
        if rising & FAST_RESET and self._platform is not None:
            self._platform.request_reset(True, "guest-reset")
