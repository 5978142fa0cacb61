"""The BARs of a vfio-pci device in the guest's address space.

What may be mmapped becomes guest memory; the rest is trapped, and read and written for the guest.
The pages that hold the MSI-X table and its pending bits are always trapped: both are emulated.
"""

from __future__ import annotations

from cpr import report
from cpr.constants import PAGE_SIZE
from cpr.devices.pci_bars import is_free
from cpr.devices.pci_config import Bar
from cpr.errors import KernelError
from cpr.uapi import vfio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.devices.base import Platform
    from cpr.devices.pci_config import ConfigSpace
    from cpr.devices.pci_msi import MsixCapability
    from cpr.devices.vfio_interrupts import Interrupts
    from cpr.uapi.fd import Fd
    from cpr.uapi.vfio import RegionInfo


class BarRegion:
    """One BAR.  Its mmapped areas stay mapped as long as it lives; `place` puts them at an address.

    Areas are (offset in the BAR, size, address in this process).
    """

    def __init__(
        self,
        bar: Bar,
        region: RegionInfo,
        device: Fd,
        platform: Platform,
        msix: MsixCapability | None,
        kernel: Any = vfio,
    ) -> None:
        self.bar = bar
        self._region = region
        self._device = device
        self._platform = platform
        self._kernel = kernel
        self._base: int | None = None
        self._msix = msix
        self._interrupts: Interrupts | None = None
        self._table = self._place_of(msix, True)
        self._pba = self._place_of(msix, False)
        self._areas: list[tuple[int, int, int]] = []
        self._placed: list[tuple[int, int]] = []
        self._trapped: list[tuple[int, int]] = []
        for offset, size in mappable(region, [self._table, self._pba]) if not bar.is_io else []:
            address = kernel.map_region(device, region, offset, size)
            self._areas.append((offset, size, address))

    def _place_of(self, msix: MsixCapability | None, is_table: bool) -> tuple[int, int]:
        """(offset, size) in this BAR of the MSI-X table or the pending bits; size 0 for none."""
        if msix is None:
            return 0, 0
        if is_table:
            there, offset, size = msix.table_bar, msix.table_offset, msix.table_size
        else:
            there, offset, size = msix.pba_bar, msix.pba_offset, msix.pba_size
        return (offset, size) if there == self.bar.index else (0, 0)

    def connect(self, interrupts: Interrupts) -> None:
        """Whom writes to the MSI-X table are told."""
        self._interrupts = interrupts

    def update(self, config: ConfigSpace, command: int, loading: bool = False) -> None:
        """Puts the BAR where its register says; nowhere where something else is.

        `loading`: as of EmulatedBar.
        """
        base = self.bar.address(config, command)
        if base == self._base:
            return
        self.remove()
        if base is not None and (self.bar.is_io or is_free(self._platform, base, self.bar.size)):
            self._place(base, loading)

    def _place(self, base: int, loading: bool) -> None:
        self._base = base
        try:
            for offset, size, address in self._areas:
                self._platform.accel.map_ram(
                    base + offset, size, address, readonly=not self._region.writable
                )
                self._placed.append((base + offset, size))
            for offset, size in self._gaps():
                self._trap(base, offset, size)
        except (KernelError, ValueError) as error:  # the guest put it over another device
            if not loading:
                report.warn_report(f"BAR {self.bar.index}: {error}")
            self.remove()

    def _trap(self, base: int, start: int, size: int) -> None:
        def read(offset: int, length: int) -> int:
            return self.read(start + offset, length)

        def write(offset: int, length: int, value: int) -> None:
            self.write(start + offset, length, value)

        register = self._platform.register_io if self.bar.is_io else self._platform.register_mmio
        name = f"{self._device.name} BAR {self.bar.index}"
        register(base + start, size, read, write, name, 4)
        self._trapped.append((base + start, size))

    def _gaps(self) -> list[tuple[int, int]]:
        """(offset, size) of what is not mmapped."""
        gaps, position = [], 0
        for offset, size, _ in [*sorted(self._areas), (self.bar.size, 0, 0)]:
            if offset > position:
                gaps.append((position, offset - position))
            position = offset + size
        return gaps

    def remove(self) -> None:
        """Takes the BAR out of the guest's address space; the inverse of `update`."""
        for address, size in self._placed:
            self._platform.accel.unmap_ram(address, size)
        is_io = self.bar.is_io
        unregister = self._platform.unregister_io if is_io else self._platform.unregister_mmio
        for address, size in self._trapped:
            unregister(address, size)
        self._placed, self._trapped, self._base = [], [], None

    def close(self) -> None:
        """Unmaps everything, in this process too."""
        self.remove()
        for _, size, address in self._areas:
            self._kernel.unmap_region(address, size)
        self._areas = []

    def read(self, offset: int, size: int) -> int:
        """A trapped read; ones where the device cannot be read, as from an empty slot."""
        if self._msix is not None:
            start, length = self._table
            if start <= offset < start + length:
                return self._msix.read_table(offset - start, size)
            start, length = self._pba
            if start <= offset < start + length:
                return self._msix.read_pba(offset - start, size)
        try:
            value: int = self._kernel.read_region(self._device, self._region, offset, size)
        except KernelError:
            return (1 << 8 * size) - 1
        return value

    def _follow(self, vector: int) -> None:
        """The guest has changed an entry of the MSI-X table."""
        if self._interrupts is None:
            return
        try:
            self._interrupts.update_vector(vector)
        except KernelError as error:
            name = self._device.name
            report.warn_report(f"vfio {name} vector {vector}: {error}")

    def write(self, offset: int, size: int, value: int) -> None:
        """A trapped write; what the device refuses vanishes."""
        if self._msix is not None:
            start, length = self._table
            if start <= offset < start + length:
                vector = self._msix.write_table(offset - start, size, value)
                if vector >= 0:
                    self._follow(vector)
                return
            start, length = self._pba
            if start <= offset < start + length:
                return  # read-only
        try:
            self._kernel.write_region(self._device, self._region, offset, size, value)
        except KernelError:
            pass


def mappable(region: RegionInfo, holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The areas of the region that may be mmapped, in whole pages, without those of `holes`."""
    areas = [(offset, offset + size) for offset, size in region.areas]
    for offset, size in holes:
        if not size:
            continue
        first, last = offset // PAGE_SIZE, -(-(offset + size) // PAGE_SIZE)
        areas = [
            piece
            for start, end in areas
            for piece in ((start, min(end, first * PAGE_SIZE)), (max(start, last * PAGE_SIZE), end))
            if piece[0] < piece[1]
        ]
    whole = [(-(-start // PAGE_SIZE), end // PAGE_SIZE) for start, end in areas]
    return [(start * PAGE_SIZE, (end - start) * PAGE_SIZE) for start, end in whole if start < end]
