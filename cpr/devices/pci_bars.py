"""Where a BAR may be, and BARs of emulated devices in the guest's address space."""

from __future__ import annotations

from cpr import report
from cpr.devices.pci import ECAM_BASE, ECAM_SIZE
from cpr.devices.pci_config import overlaps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.devices.base import Platform
    from cpr.devices.pci_config import Bar, ConfigSpace

# I/O APIC, local APICs, KVM's own pages and the BIOS: no BAR can be put over these.
RESERVED = ((ECAM_BASE, ECAM_SIZE), (0xFEC00000, 0x100000000 - 0xFEC00000))
MAX_ADDRESS = 1 << 46  # a BAR that is being sized has all of its bits set


def is_free(platform: Platform, base: int, size: int) -> bool:
    """Whether a memory BAR may be at `base`: not over RAM, nor over what the board has."""
    if base + size > MAX_ADDRESS:
        return False
    taken = [(s.start, s.size) for s in platform.memory.sections]
    return not any(overlaps(base, size, *each) for each in (*RESERVED, *taken))


class EmulatedBar:
    """One memory BAR whose accesses, of up to 4 bytes, go to read(offset, size) and write(offset,
    size, value).  `base` is where it is, or None.
    """

    def __init__(
        self,
        bar: Bar,
        name: str,
        platform: Platform,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
    ) -> None:
        self.bar = bar
        self.base: int | None = None
        self._has_warned = False
        self._name = name
        self._platform = platform
        self._read = read
        self._write = write

    def update(self, config: ConfigSpace, command: int, loading: bool = False) -> bool:
        """Puts the BAR where its register says, nowhere where something else is; true if that is
        another place than before.

        `loading`: what is there may have another place as soon as its own state is loaded.
        """
        before, base = self.base, self.bar.address(config, command)
        if base == before:
            return False
        self.remove()
        if base is not None and is_free(self._platform, base, self.bar.size):
            try:
                self._platform.register_mmio(
                    base, self.bar.size, self._read, self._write, self._name, 4
                )
                self.base = base
            except ValueError as error:  # the guest put it over another device
                if not self._has_warned and not loading:
                    self._has_warned = True
                    report.warn_report(f"BAR {self.bar.index}: {error}")
        return self.base != before

    def remove(self) -> None:
        """Takes it out of the guest's address space."""
        if self.base is not None:
            self._platform.unregister_mmio(self.base, self.bar.size)
            self.base = None
