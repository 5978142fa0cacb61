"""The i8042 keyboard controller without a keyboard: commands, output port, the reset line."""

from __future__ import annotations

from cpr.devices.base import Device
from cpr.state.vmstate import VMStateDescription, u8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.devices.base import Platform

DATA_PORT = 0x60
COMMAND_PORT = 0x64

STATUS_OUTPUT_FULL = 0x01
STATUS_SELF_TEST = 0x04
STATUS_COMMAND = 0x08
STATUS_UNLOCKED = 0x10

COMMAND_READ_MODE = 0x20
COMMAND_WRITE_MODE = 0x60
COMMAND_SELF_TEST = 0xAA
COMMAND_KEYBOARD_TEST = 0xAB
COMMAND_READ_OUTPORT = 0xD0
COMMAND_WRITE_OUTPORT = 0xD1
COMMAND_DISABLE_A20 = 0xDD
COMMAND_ENABLE_A20 = 0xDF
COMMAND_PULSE = 0xF0  # to 0xff: pulse the output lines whose bit is 0; bit 0 is reset

SELF_TEST_PASSED = 0x55
MODE_KEYBOARD_INTERRUPT = 0x01
MODE_MOUSE_INTERRUPT = 0x02
OUT_RESET = 0x01  # active low
OUT_A20 = 0x02


class I8042(Device):
    idstr = "pckbd"
    vmstate = VMStateDescription(
        "pckbd",
        3,
        3,
        (u8("kbd.write_cmd"), u8("kbd.status"), u8("kbd.mode"), u8("kbd.pending_tmp")),
        subsections=(
            VMStateDescription("pckbd_outport", 1, 1, (u8("kbd.outport"), u8("kbd.obdata"))),
        ),
    )

    def __init__(self) -> None:
        self._platform: Platform | None = None
        self.reset()

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        platform.register_io(DATA_PORT, 1, self._read_data, self._write_data, "i8042-data")
        platform.register_io(COMMAND_PORT, 1, self._read_status, self._command, "i8042-cmd")

    def unrealize(self) -> None:
        if self._platform is not None:
            self._platform.unregister_io(DATA_PORT, 1)
            self._platform.unregister_io(COMMAND_PORT, 1)
            self._platform = None

    def reset(self) -> None:
        self._write_command = 0
        self._status = STATUS_COMMAND | STATUS_UNLOCKED
        self._mode = MODE_KEYBOARD_INTERRUPT | MODE_MOUSE_INTERRUPT
        self._outport = OUT_RESET | OUT_A20
        self._data = 0

    def save(self) -> dict:
        return {
            "kbd.write_cmd": self._write_command,
            "kbd.status": self._status,
            "kbd.mode": self._mode,
            "kbd.pending_tmp": 0,
            "pckbd_outport": {"kbd.outport": self._outport, "kbd.obdata": self._data},
        }

    def restore(self, state: dict) -> None:
        self._write_command = state["kbd.write_cmd"]
        self._status = state["kbd.status"]
        self._mode = state["kbd.mode"]
        outport = state.get("pckbd_outport", {})
        self._outport = outport.get("kbd.outport", OUT_RESET | OUT_A20)
        self._data = outport.get("kbd.obdata", 0)

    def _read_data(self, offset: int, size: int) -> int:
        self._status &= ~STATUS_OUTPUT_FULL
        return self._data

    def _read_status(self, offset: int, size: int) -> int:
        return self._status

    def _reply(self, value: int) -> None:
        self._data = value
        self._status |= STATUS_OUTPUT_FULL

    def _write_data(self, offset: int, size: int, value: int) -> None:
        command, self._write_command = self._write_command, 0
        if command == COMMAND_WRITE_MODE:
            self._mode = value & 0xFF
        elif command == COMMAND_WRITE_OUTPORT:
            self._set_outport(value & 0xFF)

    def _command(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if value in (COMMAND_WRITE_MODE, COMMAND_WRITE_OUTPORT):
            self._write_command = value
        elif value == COMMAND_READ_MODE:
            self._reply(self._mode)
        elif value == COMMAND_SELF_TEST:
            self._status |= STATUS_SELF_TEST
            self._reply(SELF_TEST_PASSED)
        elif value == COMMAND_KEYBOARD_TEST:
            self._reply(0)
        elif value == COMMAND_READ_OUTPORT:
            self._reply(self._outport)
        elif value == COMMAND_ENABLE_A20:
            self._outport |= OUT_A20
        elif value == COMMAND_DISABLE_A20:
            self._outport &= ~OUT_A20
        elif value >= COMMAND_PULSE and not value & OUT_RESET:
            self._reset_guest()

    def _set_outport(self, value: int) -> None:
        self._outport = value
        if not value & OUT_RESET:
            self._reset_guest()

    def _reset_guest(self) -> None:
        if self._platform is not None:
            self._platform.request_reset(True, "guest-reset")
