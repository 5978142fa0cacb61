"""VFIO containers and groups: guest RAM for the DMA of the devices, by type1.

    container  /dev/vfio/vfio   an IOMMU address space; CPR name "vfio_container_for_group", group
    group      /dev/vfio/N      what the IOMMU can isolate;  CPR name "vfio_group", N
    device     from its group   CPR name: its PCI address, 0

A container's section "vfio-container" has no fields.  When it is saved the addresses of all its
mappings are made invalid, while their DMA goes on; when the guest is the new VMM's for good each
gets its new address.
"""

from __future__ import annotations

import errno

from cpr.devices import dma
from cpr.devices.base import DESCRIPTORS_KEPT, Device
from cpr.devices.dma import DmaMappings
from cpr.errors import ConfigError, CprError, KernelError
from cpr.state.vmstate import VMStateDescription
from cpr.uapi import vfio, vfio_sysfs
from cpr.uapi.fd import same_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.devices.base import Platform
    from cpr.memory import Section
    from cpr.state.fds import PreservedFds
    from cpr.uapi.fd import Fd

CONTAINER_NAME = "vfio_container_for_group"
GROUP_NAME = "vfio_group"
MISSING = (
    "the VMM before this one had no such device or group; give the same -device vfio-pci as there"
)


class Type1Container(DmaMappings):
    """One container.  Owns its descriptor; `claimed` says that it came over from another VMM.

    A claimed one has its mappings, and is told where they are now by `take_over`.
    """

    idstr = "vfio-container"
    vmstate = VMStateDescription("vfio-container", 0, 0, ())
    saved_last = True

    def __init__(self, fd: Fd, claimed: bool, instance_id: int, kernel: Any = vfio) -> None:
        super().__init__(claimed)
        self.fd = fd
        self.instance_id = instance_id
        self._kernel = kernel
        self._platform: Platform | None = None
        self._sections: list[Section] = []
        self._stale: list[Section] = []

    def realize(self, platform: Platform) -> None:
        platform.memory.add_listener(self)
        self._platform = platform

    def unrealize(self) -> None:
        if self._platform is not None:
            self._platform.memory.remove_listener(self)
            self._platform = None
        self.fd.close()

    def section_added(self, section: Section) -> None:
        if not self._claimed:
            host = _host_address(section)
            self._kernel.map_dma(self.fd, section.start, section.size, host, section.readonly)
        self._sections.append(section)

    def section_removed(self, section: Section) -> None:
        self._sections.remove(section)
        if section in self._stale:
            self._stale.remove(section)
        if not self.others:
            self._kernel.unmap_dma(self.fd, section.start, section.size)

    def cpr_blocker(self, mode: str) -> str | None:
        if mode not in DESCRIPTORS_KEPT:
            return None
        if not self._kernel.updates_vaddr(self.fd):
            return "VFIO container does not support VFIO_UPDATE_VADDR"
        if not self._kernel.unmaps_all(self.fd):
            return "VFIO container does not support VFIO_UNMAP_ALL"
        if self._stale and not self._mode:
            try:
                self._update_vaddrs()
            except KernelError as error:
                return f"VFIO container has no addresses since the last update: {error}"
        return None

    def cpr_rollback(self) -> None:
        """Also where only some of the addresses can be given back: their DMA has never stopped."""
        super().cpr_rollback()
        self._update_or_warn()

    def save(self) -> dict:
        self._kernel.invalidate_vaddrs(self.fd)
        self._stale = list(self._sections)
        return {}

    def take_over(self) -> None:
        if self._claimed:
            self._claimed = False
            self._stale = list(self._sections)
            self._update_or_warn()

    def _update_or_warn(self) -> None:
        try:
            self._update_or_renew()
        except KernelError as error:
            dma.warn(error)

    def _update_or_renew(self) -> None:
        """Addresses that are valid are another VMM's, which ended before the guest was its own."""
        try:
            self._update_vaddrs()
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
            self._kernel.invalidate_vaddrs(self.fd)
            self._stale = list(self._sections)
            self._update_vaddrs()

    def _update_vaddrs(self) -> None:
        """Gives every mapping its address; tries all of them before it raises KernelError."""
        stale, self._stale = self._stale, []
        problem = None
        for section in stale:
            host = _host_address(section)
            try:
                self._kernel.update_vaddr(self.fd, section.start, section.size, host)
            except KernelError as error:
                problem = problem or error
                self._stale.append(section)
        if problem is not None:
            raise problem


class Group(Device):
    """One IOMMU group in a container.  Owns its descriptor.

    `copy` is a second descriptor of its container, which it owns too: cpr-transfer makes one for
    each group.  A `claimed` one came over, and is another VM's until `take_over`.
    """

    plain = False

    def __init__(self, number: int, fd: Fd, fds: PreservedFds, claimed: bool = False) -> None:
        self.number = number
        self._claimed = claimed
        self.fd = fd
        self.copy: Fd | None = None
        self._fds = fds
        self._platform: Platform | None = None

    def realize(self, platform: Platform) -> None:
        if not self._claimed:
            platform.accel.add_vfio_file(self.fd.number)
        self._platform = platform

    def take_over(self) -> None:
        if self._claimed and self._platform is not None:
            self._claimed = False
            self._platform.accel.add_vfio_file(self.fd.number)

    def unrealize(self) -> None:
        """The group's devices are closed by now, and its container if no other group is in it."""
        if self._platform is not None:
            self._platform.accel.remove_vfio_file(self.fd.number)
            self._platform = None
        self._fds.delete(CONTAINER_NAME, self.number)
        self._fds.delete(GROUP_NAME, self.number)
        self.fd.close()
        if self.copy is not None:
            self.copy.close()

    def cpr_prepare(self, mode: str) -> None:
        """The old VM must not hold the group when the new one takes it."""
        if mode in DESCRIPTORS_KEPT and self._platform is not None:
            self._platform.accel.remove_vfio_file(self.fd.number)

    def cpr_rollback(self) -> None:
        if self._platform is not None and not self._claimed:
            self._platform.accel.add_vfio_file(self.fd.number)


class Type1:
    """The containers and groups of one VM.  `add_device` puts what is made into the machine."""

    def __init__(
        self,
        fds: PreservedFds,
        add_device: Callable[[Device], None],
        kernel: Any = vfio,
        sysfs: Any = vfio_sysfs,
    ) -> None:
        self._fds = fds
        self._add_device = add_device
        self._kernel = kernel
        self._sysfs = sysfs
        self._containers: list[Type1Container] = []
        self._groups: dict[int, Group] = {}

    def open(self, name: str, sysfs: str) -> Fd:
        """The device with PCI address `name`; the caller owns it, and it is saved in the registry.

        Raises ConfigError, KernelError, or StateError where the CPR state lacks one of its
        descriptors; what was made for its group stays for the group's next device.
        """
        number = self._sysfs.group_of(sysfs)
        if number is None:
            raise ConfigError(
                f"vfio {name}: no iommu_group found; switch the IOMMU on (intel_iommu=on) and "
                f"{self._sysfs.bind_remedy(name)}"
            )
        check_name(self._fds, name)
        if number not in self._groups:
            self._open_group(number, name)
        group = self._groups[number].fd
        device = self._fds.open(name, 0, lambda: self._kernel.get_device_fd(group, name).release())
        return self._kernel.adopt(device, name)

    def close(self, name: str, device: Fd) -> None:
        """The inverse of `open`; the group stays until the machine ends."""
        self._fds.delete(name, 0)
        device.close()

    def leave_vm(self, device: Fd) -> None:
        """It is the group that the accelerator's VM has."""

    def join_vm(self, device: Fd) -> None:
        """The inverse of `leave_vm`."""

    def _open_group(self, number: int, name: str) -> None:
        """The container is added after its first group: at the end it must go before that."""
        fds, kernel = self._fds, self._kernel
        for kept in (GROUP_NAME, CONTAINER_NAME):
            fds.require(kept, number, MISSING)
        opened = fds.open(GROUP_NAME, number, lambda: kernel.open_group(number, name).release())
        fd = kernel.adopt(opened, f"/dev/vfio/{number}")
        claimed = fds.came(GROUP_NAME, number)
        try:
            joined = fds.open(CONTAINER_NAME, number, lambda: self._join_container(fd))
        except KernelError:
            fds.delete(GROUP_NAME, number)
            fd.close()
            raise
        group = Group(number, fd, fds, claimed)
        self._add_device(group)
        self._groups[number] = group
        container = kernel.adopt(joined, kernel.CONTAINER)
        for known in self._containers:
            if same_file(joined, known.fd.number):
                group.copy = None if joined == known.fd.number else container
                return
        self._add_container(container, claimed)

    def _add_container(self, fd: Fd, claimed: bool) -> None:
        container = Type1Container(fd, claimed, len(self._containers), self._kernel)
        try:
            self._add_device(container)
        except CprError:
            fd.close()
            raise
        self._containers.append(container)

    def _join_container(self, group: Fd) -> int:
        """Puts the group into the first container that takes it, or into a new one."""
        for container in self._containers:
            try:
                self._kernel.set_container(group, container.fd)
                return container.fd.number
            except KernelError:  # its IOMMU is another one
                continue
        fd = self._kernel.open_container()
        try:
            self._kernel.set_container(group, fd)
            self._kernel.set_iommu(fd)
        except KernelError:
            fd.close()
            raise
        return fd.release()


def check_name(fds: PreservedFds, name: str) -> None:
    """Raises StateError for a device that the CPR state lacks, ConfigError for one given twice."""
    fds.require(name, 0, MISSING)
    if fds.find(name, 0) is not None and not fds.came(name, 0):
        raise ConfigError(f"vfio {name}: device is already attached")


def _host_address(section: Section) -> int:
    return section.block.host + section.offset
