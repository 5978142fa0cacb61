"""ACPI power management as the PIIX4 has it once its I/O base is set: PM1 event and control.

The base is fixed at 0x600, where SeaBIOS puts it too.
"""

from __future__ import annotations

from cpr.constants import NS_PER_S
from cpr.devices.base import Device
from cpr.state.vmstate import VMStateDescription, u16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.acpi.tables import Acpi
    from cpr.devices.base import Platform

BASE = 0x600
LENGTH = 0x40
PM1_STATUS, PM1_ENABLE, PM1_CONTROL, PM_TIMER = 0x00, 0x02, 0x04, 0x08
TIMER_HZ = 3_579_545
SCI_IRQ = 9

POWER_BUTTON = 1 << 8  # in PM1 status and enable (ACPI 6.5, 4.8.3.1)
WAKE = 1 << 15  # in PM1 status
SLEEP_TYPE_SHIFT = 10
SLEEP_ENABLE = 1 << 13
SLEEP_TYPE_OFF, SLEEP_TYPE_RAM = 0, 1  # S5 and S3 of this chip


class Piix4Pm(Device):
    idstr = "piix4_pm"
    vmstate = VMStateDescription(
        "piix4_pm",
        3,
        3,
        (u16("ar.pm1.evt.sts"), u16("ar.pm1.evt.en"), u16("ar.pm1.cnt.cnt")),
    )

    def __init__(self) -> None:
        self._platform: Platform | None = None
        self._status = 0
        self._enable = 0
        self._control = 0

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        platform.register_io(BASE, LENGTH, self._read, self._write, "acpi-pm", access_size=4)

    def unrealize(self) -> None:
        if self._platform is not None:
            self._platform.unregister_io(BASE, LENGTH)
            self._platform = None

    def describe(self, acpi: Acpi) -> None:
        from cpr.acpi import aml
        from cpr.acpi.tables import HIGH_LEVEL

        acpi.set_fadt(
            SCI_INT=SCI_IRQ,
            PM1a_EVT_BLK=BASE + PM1_STATUS,
            PM1_EVT_LEN=4,
            PM1a_CNT_BLK=BASE + PM1_CONTROL,
            PM1_CNT_LEN=2,
            PM_TMR_BLK=BASE + PM_TIMER,
            PM_TMR_LEN=4,
        )
        acpi.add_override(SCI_IRQ, SCI_IRQ, HIGH_LEVEL)
        for name, sleep_type in (("_S3", SLEEP_TYPE_RAM), ("_S5", SLEEP_TYPE_OFF)):
            values = [aml.integer(value) for value in (sleep_type, sleep_type, 0, 0)]
            acpi.add_object(aml.name(name, aml.package(*values)))

    def reset(self) -> None:
        self._status = self._enable = self._control = 0

    def save(self) -> dict:
        return {
            "ar.pm1.evt.sts": self._status,
            "ar.pm1.evt.en": self._enable,
            "ar.pm1.cnt.cnt": self._control,
        }

    def restore(self, state: dict) -> None:
        self._status = state["ar.pm1.evt.sts"]
        self._enable = state["ar.pm1.evt.en"]
        self._control = state["ar.pm1.cnt.cnt"]

    def on_wakeup(self) -> None:
        self._status |= WAKE

    def on_powerdown(self) -> None:
        self._status |= POWER_BUTTON
        self._update_sci()

    def _update_sci(self) -> None:
        if self._platform is not None:
            self._platform.set_irq(SCI_IRQ, bool(self._status & self._enable))

    def _read(self, offset: int, size: int) -> int:
        if offset == PM1_STATUS:
            return self._status | (self._enable << 16 if size == 4 else 0)
        if offset == PM1_ENABLE:
            return self._enable
        if offset == PM1_CONTROL:
            return self._control
        if offset == PM_TIMER and self._platform is not None:
            return self._platform.clock.now() * TIMER_HZ // NS_PER_S & 0xFFFFFF
        return 0

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset == PM1_STATUS:
            self._status &= ~value & 0xFFFF  # write one to clear
            if size == 4:
                self._enable = value >> 16
            self._update_sci()
        elif offset == PM1_ENABLE:
            self._enable = value & 0xFFFF
            self._update_sci()
        elif offset == PM1_CONTROL:
            self._control = value & ~SLEEP_ENABLE & 0xFFFF
            if value & SLEEP_ENABLE and self._platform is not None:
                sleep_type = value >> SLEEP_TYPE_SHIFT & 7
                if sleep_type == SLEEP_TYPE_OFF:
                    self._platform.request_shutdown(True, "guest-shutdown")
                elif sleep_type == SLEEP_TYPE_RAM:
                    self._platform.request_suspend()
