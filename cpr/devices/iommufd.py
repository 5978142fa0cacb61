"""-object iommufd: guest RAM for the DMA of the devices, by an I/O address space (IOAS).

The iommufd's CPR name is its object's id.  The section "iommufd" has no fields: who takes it over
becomes the process that the mappings belong to, which needs all of them to be of memfds.
"""

from __future__ import annotations

import errno
import os

from cpr.devices import dma
from cpr.devices.base import DESCRIPTORS_KEPT
from cpr.devices.dma import DmaMappings
from cpr.errors import ConfigError, KernelError, MigrationError
from cpr.state.vmstate import VMStateDescription
from cpr.uapi import iommufd, memlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.devices.base import Platform
    from cpr.memory import Section
    from cpr.state.fds import PreservedFds
    from cpr.uapi.fd import Fd

UNSUPPORTED = "vfio iommufd backend does not support IOMMU_IOAS_CHANGE_PROCESS"
UNSUPPORTED_REGIONS = "some memory regions do not support IOMMU_IOAS_CHANGE_PROCESS"


class IommufdBackend(DmaMappings):
    """One iommufd, with one IOAS.  Owns its descriptor, which is saved under `name`.

    `passed` is the descriptor of fd=, taken over where the registry has none.
    """

    idstr = "iommufd"
    vmstate = VMStateDescription("iommufd", 0, 0, ())

    def __init__(
        self,
        name: str,
        passed: int | None,
        fds: PreservedFds,
        instance_id: int = 0,
        kernel: Any = iommufd,
    ) -> None:
        super().__init__(fds.came(name, 0))
        self.name = name
        self.instance_id = instance_id
        self.ioas_id: int | None = None
        self._hwpts: list[int] = []
        self._fds = fds
        self._kernel = kernel
        self._platform: Platform | None = None
        self._locked = 0
        self._listens = False

        def opener() -> int:
            return kernel.open_device().release() if passed is None else passed

        self.fd: Fd = kernel.adopt(fds.open(name, 0, opener))

    def realize(self, platform: Platform) -> None:
        self._platform = platform

    def unrealize(self) -> None:
        if self._platform is not None and self._listens:
            self._platform.memory.remove_listener(self)
        self._platform = None
        self._fds.delete(self.name, 0)
        self.fd.close()

    # What the devices that are bound to it need.

    def attach(self, device_id: int, attach: Callable[[int], None]) -> int:
        """Attaches a device by `attach(page table)`, and lets it reach guest RAM.

        Returns the id of its hardware page table.  Raises KernelError.
        """
        assert self._platform is not None
        if self.ioas_id is None:
            self.ioas_id = self._kernel.alloc_ioas(self.fd)
        hwpt_id = self._attach_to_any(device_id, attach)
        if not self._listens:  # the IOAS knows by now which addresses the device cannot use
            self._platform.memory.add_listener(self)
            self._listens = True
        return hwpt_id

    def _attach_to_any(self, device_id: int, attach: Callable[[int], None]) -> int:
        assert self.ioas_id is not None
        for hwpt_id in self._hwpts:
            try:
                attach(hwpt_id)
                return hwpt_id
            except KernelError as error:
                if error.errno != errno.EINVAL:  # EINVAL: another IOMMU's
                    raise
        hwpt_id = self._kernel.alloc_hwpt(self.fd, device_id, self.ioas_id)
        try:
            attach(hwpt_id)
        except KernelError:
            self._kernel.destroy(self.fd, hwpt_id)
            raise
        self._hwpts.append(hwpt_id)
        return hwpt_id

    def claim(self, ioas_id: int, hwpt_id: int) -> None:
        """The same for a device that came attached: its RAM is mapped already."""
        assert self._platform is not None
        self.ioas_id = ioas_id
        if hwpt_id not in self._hwpts:
            self._hwpts.append(hwpt_id)
        if not self._listens:
            self._platform.memory.add_listener(self)
            self._listens = True

    def section_added(self, section: Section) -> None:
        if not self._claimed:
            self._map(section)
        self._locked += section.size

    def section_removed(self, section: Section) -> None:
        self._locked -= section.size
        if not self.others:
            self._kernel.unmap(self.fd, self.ioas_id, section.start, section.size)

    def _map(self, section: Section) -> None:
        block = section.block
        if block.preserved:
            try:
                self._kernel.map_file(
                    self.fd,
                    self.ioas_id,
                    section.start,
                    section.size,
                    block.fd,
                    section.offset,
                    section.readonly,
                )
                return
            except KernelError as error:
                if error.errno != errno.ENOTTY:  # a kernel before 6.13 has only the other way
                    raise
        host = block.host + section.offset
        self._kernel.map_memory(
            self.fd, self.ioas_id, section.start, section.size, host, section.readonly
        )

    # An update.

    def cpr_blocker(self, mode: str) -> str | None:
        if mode not in DESCRIPTORS_KEPT:
            return None
        try:
            self._kernel.change_process(self.fd, self._locked)
        except KernelError as error:
            if error.errno == errno.ENOTTY:
                return UNSUPPORTED
            if error.errno == errno.EINVAL:
                return f"{UNSUPPORTED_REGIONS}; {error.remedy}"
            return str(error)
        if not memlock.has_room(2 * self._locked):
            remedy = memlock.memlock_remedy(2 * self._locked)
            return (
                "IOMMU_IOAS_CHANGE_PROCESS would fail in the new VMM, which counts locked memory "
                f"before the old one's is taken off: {remedy}"
            )
        return None

    def save(self) -> dict:
        """Nothing changes by this: the mappings are this process's until another one asks."""
        try:
            self._kernel.change_process(self.fd, self._locked)
        except KernelError as error:
            raise MigrationError(f"{UNSUPPORTED_REGIONS}: {error}") from None
        return {}

    def take_over(self) -> None:
        if self._claimed:
            self._claimed = False
            self._change_or_warn()

    def cpr_rollback(self) -> None:
        """A new VMM may have made them its own before it failed."""
        saved = self.needed() and self._listens
        super().cpr_rollback()
        if saved:
            self._change_or_warn()

    def _change_or_warn(self) -> None:
        """Where it fails, the device's DMA goes on, and so does the guest."""
        try:
            self._kernel.change_process(self.fd, self._locked)
        except KernelError as error:
            dma.warn(error)


def passed_fd(value: str | None) -> int | None:
    """The fd= property: the number of a descriptor that this process was started with."""
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"Property 'fd' doesn't take value '{value}': give a descriptor's number")
    return int(value)


def passed_or_made(value: str | None, option: str, make: Callable[[], int]) -> int:
    """The descriptor of a netdev's fd= or vhostfd=, close-on-exec, else what `make` opens.

    The caller's.  Raises ConfigError.
    """
    fd = passed_fd(value)
    if fd is None:
        return make()
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise ConfigError(f"netdev {option}={fd}: {error.strerror}") from None
    return fd
