"""What maps guest RAM for the DMA of devices, by whichever kernel interface."""

from __future__ import annotations

from cpr import report
from cpr.devices.base import DESCRIPTORS_KEPT, Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.errors import KernelError


class DmaMappings(Device):
    """The mappings of one I/O address space.  In an update they stay, and so does their DMA.

    `claimed` ones came over from another VMM: RAM is mapped already.  `take_over` makes the
    mappings this process's; until then they are the other VMM's, whatever becomes of this one.
    """

    plain = False
    maps_ram = True

    def __init__(self, claimed: bool) -> None:
        self.required = claimed
        self._claimed = claimed
        self._mode = ""

    def needed(self) -> bool:
        return self._mode in DESCRIPTORS_KEPT

    def restore(self, state: dict) -> None:
        self.required = False

    @property
    def others(self) -> bool:
        """Whether the mappings are another VMM's: one before this one, or after it."""
        return self._claimed or self.needed()

    def copy_blocker(self) -> str | None:
        return f"x-cpr-ram-staging: {self.idstr}: no log tells what a device of the host writes"

    def cpr_prepare(self, mode: str) -> None:
        self._mode = mode

    def cpr_rollback(self) -> None:
        self._mode = ""


def warn(error: KernelError) -> None:
    """Where the mappings could not be made this process's: the guest does not suffer from it."""
    report.warn_report(error)
    report.warn_report("the device's DMA goes on; updates are refused until this works")
