"""VFIO devices as character devices of their own, bound to an iommufd.

    device  /dev/vfio/devices/vfioN, or the descriptor of fd=; CPR name: the device's, 0

Its ids in the iommufd are in the CPR state too: there the new VMM finds them, and allocates none.
"""

from __future__ import annotations

from cpr.devices.vfio import check_name
from cpr.errors import ConfigError, CprError, StateError
from cpr.state.cpr_state import VfioDevice
from cpr.uapi import vfio, vfio_sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.base import Accelerator
    from cpr.devices.iommufd import IommufdBackend
    from cpr.state.fds import PreservedFds
    from cpr.uapi.fd import Fd


class Cdev:
    """How one device on `iommufd` is opened; `passed` is the descriptor of fd=, or None."""

    def __init__(
        self,
        iommufd: IommufdBackend,
        accel: Accelerator,
        fds: PreservedFds,
        passed: int | None = None,
        kernel: Any = vfio,
        sysfs: Any = vfio_sysfs,
    ) -> None:
        self._iommufd = iommufd
        self._accel = accel
        self._fds = fds
        self._passed = passed
        self._kernel = kernel
        self._sysfs = sysfs

    def open(self, name: str, sysfs: str) -> Fd:
        """The device, attached; the caller owns it, and it is saved in the registry.

        Raises ConfigError, KernelError, or StateError where the CPR state lacks it.
        """
        check_name(self._fds, name)
        came = self._fds.came(name, 0)
        number = self._fds.open(name, 0, lambda: self._open(name, sysfs).release())
        device = self._kernel.adopt(number, name)
        try:
            if came:  # and is another VM's as long as that may go on
                self._claim(name)
            else:
                self.join_vm(device)
                self._bind(name, device)
        except CprError:
            self.close(name, device)
            raise
        return device

    def _bind(self, name: str, device: Fd) -> None:
        device_id = self._kernel.bind_iommufd(device, self._iommufd.fd)

        def attach(page_table: int) -> None:
            self._kernel.attach_iommufd_pt(device, page_table)

        hwpt_id = self._iommufd.attach(device_id, attach)
        assert self._iommufd.ioas_id is not None
        self._fds.vfio_devices.append(VfioDevice(name, device_id, self._iommufd.ioas_id, hwpt_id))

    def _claim(self, name: str) -> None:
        """It is bound and attached already."""
        ids = next((each for each in self._fds.vfio_devices if each.name == name), None)
        if ids is None:
            raise StateError(f"the CPR state has no ids of VFIO device '{name}' in its iommufd")
        self._iommufd.claim(ids.ioas_id, ids.hwpt_id)

    def close(self, name: str, device: Fd) -> None:
        """The inverse of `open`."""
        self.leave_vm(device)
        self._fds.delete(name, 0)
        kept = [each for each in self._fds.vfio_devices if each.name != name]
        self._fds.vfio_devices[:] = kept
        device.close()

    def leave_vm(self, device: Fd) -> None:
        """The accelerator's VM has the device no more; the inverse is `join_vm`."""
        self._accel.remove_vfio_file(device.number)

    def join_vm(self, device: Fd) -> None:
        self._accel.add_vfio_file(device.number)

    def _open(self, name: str, sysfs: str) -> Fd:
        if self._passed is not None:
            return self._kernel.adopt(self._passed, name)
        path = self._sysfs.cdev_path(sysfs)
        if path is None:
            raise ConfigError(
                f"vfio {name}: has no character device; the host's kernel needs "
                f"CONFIG_VFIO_DEVICE_CDEV, and {self._sysfs.bind_remedy(name)}"
            )
        return self._kernel.open_cdev(path, name)
