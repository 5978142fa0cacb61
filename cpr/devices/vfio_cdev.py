"""VFIO devices as character devices of their own, bound to an iommufd.

    device  /dev/vfio/devices/vfioN, or the descriptor of fd=; CPR name: the device's, 0

Its ids in the iommufd are in the CPR state too: there the new VMM finds them, and allocates none.
"""

from __future__ import annotations

from cpr.devices.vfio import already_attached, missing_fd
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
        if self._fds.incoming:
            return self._claim(name)
        if self._fds.find(name, 0) is not None:
            raise already_attached(name)
        device = self._open(name, sysfs)
        try:
            self._accel.add_vfio_file(device.number)
            device_id = self._kernel.bind_iommufd(device, self._iommufd.fd)

            def attach(page_table: int) -> None:
                self._kernel.attach_iommufd_pt(device, page_table)

            hwpt_id = self._iommufd.attach(device_id, attach)
        except CprError:
            self.leave_vm(device)
            device.close()
            raise
        assert self._iommufd.ioas_id is not None
        self._fds.save(name, 0, device.number)
        self._fds.vfio_devices.append(VfioDevice(name, device_id, self._iommufd.ioas_id, hwpt_id))
        return device

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

    def _claim(self, name: str) -> Fd:
        number = self._fds.find(name, 0)
        if number is None:
            raise missing_fd(name, 0)
        ids = next((each for each in self._fds.vfio_devices if each.name == name), None)
        if ids is None:
            raise StateError(f"the CPR state has no ids of VFIO device '{name}' in its iommufd")
        device = self._kernel.adopt(number, name)
        self._accel.add_vfio_file(number)
        self._iommufd.claim(ids.ioas_id, ids.hwpt_id)
        return device
