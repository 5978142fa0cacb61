"""vfio-pci: a PCI device of the host, given to the guest (Documentation/driver-api/vfio.rst).

Its section "vfio-cpr-pci" holds what is emulated of it: configuration space, MSI-X table, and how
INTx is wired.  Everything else is in the device, which an update does not touch: its descriptors go
over, and it is neither opened, bound, attached nor reset again.  A new VMM only reads of it until
the guest is its own.
"""

from __future__ import annotations

import os

from cpr import report
from cpr.constants import NORMAL, REBOOT
from cpr.devices import pci_config
from cpr.devices.base import DESCRIPTORS_KEPT, Device
from cpr.devices.pci import FUNCTION_SIZE, PciFunction
from cpr.devices.pci_config import Bar, ConfigSpace
from cpr.devices.pci_msi import MSIX_PBA, MSIX_TABLE, MsiCapability, MsixCapability
from cpr.devices.vfio_host_events import HostEvents
from cpr.devices.vfio_interrupts import INTX, MSI, MSIX, Interrupts, Notifiers
from cpr.devices.vfio_regions import BarRegion
from cpr.errors import ConfigError, CprError, KernelError, MigrationError
from cpr.state.vmstate import VMStateDescription, boolean, i32, struct_, u32
from cpr.uapi import vfio, vfio_sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from cpr.devices.base import Platform
    from cpr.devices.pci import PciHost
    from cpr.state.fds import PreservedFds
    from cpr.uapi.fd import Fd

    class Backend(Protocol):
        """How the device and its IOMMU are had: VFIO's type1 or an iommufd."""

        def open(self, name: str, sysfs: str) -> Fd: ...
        def close(self, name: str, device: Fd) -> None: ...
        def leave_vm(self, device: Fd) -> None: ...
        def join_vm(self, device: Fd) -> None: ...

    class Host(Protocol):
        """What tells of the host's devices: cpr.uapi.vfio_sysfs."""

        def group_of(self, sysfs: str) -> int | None: ...
        def is_mdev(self, sysfs: str) -> bool: ...


REBOOT_REFUSED = "VFIO device only supports cpr-reboot for runstate suspended"

INTX_ENABLED, INTX_DISABLED = 0, 2  # PCIINTxRoute.mode

VMSTATE_INTX = VMStateDescription(
    "vfio-cpr-intx", 0, 0, (boolean("pending"), u32("route.mode"), i32("route.irq"))
)


class VfioPci(Device, PciFunction):
    """One device of the host.  Owns its descriptor and eventfds, which are in `fds`.

    `name` is what QEMU calls it, the PCI address; `sysfs` the folder that tells of it, or "" for a
    descriptor that was passed.  `nameless`: the name is of this process only.
    """

    plain = False

    def __init__(
        self,
        name: str,
        sysfs: str,
        slot: int | None,
        backend: Backend,
        bus: PciHost,
        fds: PreservedFds,
        nameless: bool = False,
        kernel: Any = vfio,
        host: Host = vfio_sysfs,
    ) -> None:
        self.name = name
        self._sysfs = sysfs
        self._slot = slot
        self._backend = backend
        self._bus = bus
        self._fds = fds
        self._nameless = nameless
        self._kernel = kernel
        self._host = host
        self._platform: Platform | None = None
        self._device: Fd | None = None
        self._mode = ""
        self.required = self._claimed = fds.came(name, 0)
        self._notifiers = Notifiers(name, fds)
        self._host_events: HostEvents | None = None
        self._connection: Interrupts | None = None
        self._bars: list[BarRegion] = []
        self._msi: MsiCapability | None = None
        self._msix: MsixCapability | None = None

    def realize(self, platform: Platform) -> None:
        """Raises KernelError, StateError or ConfigError; then everything is given back."""
        platform.accel.check_irqfds()
        if self._host.is_mdev(self._sysfs):
            raise ConfigError(f"vfio {self.name}: mediated devices are not supported")
        self._platform = platform
        try:
            self._realize(platform)
        except CprError:
            self.unrealize()
            raise

    def _realize(self, platform: Platform) -> None:
        kernel = self._kernel
        claimed = self._claimed
        self._device = device = self._backend.open(self.name, self._sysfs)
        info = kernel.device_info(device)
        if not info.is_pci:
            raise ConfigError(f"vfio {self.name}: isn't a PCI device")
        self._resets = info.resets
        self._config_region = kernel.region_info(device, vfio.CONFIG_REGION)
        self.config = ConfigSpace(
            256 if self._config_region.size < FUNCTION_SIZE else FUNCTION_SIZE
        )
        if not claimed:  # else the stream brings it
            self.config.data[:] = kernel.read_bytes(
                device, self._config_region, 0, self.config.size
            )
        self._bus.add(self, self._slot)
        pin = self._device_read(pci_config.INTERRUPT_PIN, 1)
        irq = self._bus.irq_of(self.slot, pin) if pin else -1
        self._irq = irq
        self._connection = Interrupts(device, self._notifiers, platform, irq, kernel)
        self._emulate_header()
        self._emulate_capabilities()
        self._create_bars()
        self._describe()
        self._host_events = HostEvents(
            self.name, kernel, device, platform, self._fds, self._notifiers
        )
        if not claimed:
            self._host_events.listen()
            self._interrupts.enable_intx()

    def _emulate_header(self) -> None:
        header = self._device_read(pci_config.HEADER_TYPE, 1)
        value = header & ~pci_config.MULTIFUNCTION
        self.config.emulate(pci_config.HEADER_TYPE, 1, value, 0xFF, 0)
        self.config.emulate(pci_config.BARS, 24, 0, (1 << 192) - 1, 0)
        self.config.emulate(pci_config.ROM_BAR, 4, 0, 0xFFFFFFFF, 0)

    def _emulate_capabilities(self) -> None:
        if not self._device_read(pci_config.STATUS, 2) & pci_config.STATUS_CAPABILITIES:
            return
        offset = self._device_read(pci_config.CAPABILITIES, 1) & ~3
        for _ in range(pci_config.MAX_CAPABILITIES):
            if not offset:
                return
            kind = self._device_read(offset, 1)
            if kind == pci_config.CAP_MSI:
                self._msi = MsiCapability(self.config, offset, self._device_read(offset + 2, 2))
            elif kind == pci_config.CAP_MSIX:
                flags = self._device_read(offset + 2, 2)
                table = self._device_read(offset + MSIX_TABLE, 4)
                pba = self._device_read(offset + MSIX_PBA, 4)
                self._msix = MsixCapability(self.config, offset, flags, table, pba)
            offset = self._device_read(offset + 1, 1) & ~3

    def _create_bars(self) -> None:
        assert self._device is not None and self._platform is not None
        index = 0
        while index < pci_config.BAR_COUNT:
            region = self._kernel.region_info(self._device, index)
            if not region.size:
                index += 1
                continue
            flags = self._device_read(pci_config.BARS + 4 * index, 4)
            bar = Bar(index, region.size, flags)
            bar.emulate(self.config)
            placed = BarRegion(bar, region, self._device, self._platform, self._msix, self._kernel)
            placed.connect(self._interrupts)
            self._bars.append(placed)
            index += 2 if bar.wide else 1

    def _describe(self) -> None:
        """The section's fields, which depend on the device, and its name."""
        fields = [struct_("parent_obj", pci_config.vmstate(self.config.size))]
        if self._msix is not None:
            fields.append(struct_("msix", self._msix.vmstate))
        fields.append(struct_("intx", VMSTATE_INTX))
        self.vmstate = VMStateDescription("vfio-cpr-pci", 0, 0, tuple(fields))
        self.idstr = f"0000:00:{self.slot:02x}.0/vfio-cpr-pci"

    def unrealize(self) -> None:
        if self._platform is None:
            return
        for bar in self._bars:
            bar.close()
        self._bars = []
        if self._device is not None:
            if self._host_events is not None:
                self._host_events.close()
                self._host_events = None
            if self._connection is not None:
                self._disconnect(self._connection)
            self._notifiers.close_all()
            self._bus.remove(self)
            self._backend.close(self.name, self._device)
            self._device = None
        self._platform = None

    def _disconnect(self, interrupts: Interrupts) -> None:
        if self.needed():  # after a cpr-transfer they are another VMM's
            interrupts.abandon()
            return
        try:
            interrupts.disable()
        except KernelError:  # the device has gone
            interrupts.abandon()

    @property
    def _interrupts(self) -> Interrupts:
        assert self._connection is not None
        return self._connection

    # The guest's side.

    def _device_read(self, offset: int, size: int) -> int:
        assert self._device is not None
        value: int = self._kernel.read_region(self._device, self._config_region, offset, size)
        return value

    def config_read(self, offset: int, size: int) -> int:
        if offset + size > self.config.size:
            return 0 if offset >= 256 else (1 << 8 * size) - 1
        try:
            value = self._device_read(offset, size)
        except KernelError:
            value = (1 << 8 * size) - 1
        return self.config.merge(offset, size, value)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The device gets every write, and leaves out what is not the guest's to change."""
        assert self._device is not None
        if offset + size > self.config.size:
            return
        try:
            self._kernel.write_region(self._device, self._config_region, offset, size, value)
        except KernelError:
            pass
        self.config.write(offset, size, value)
        if offset < pci_config.BARS + 4 * pci_config.BAR_COUNT:
            self._update_bars()
        for messages, mode in ((self._msi, MSI), (self._msix, MSIX)):
            if messages is not None and pci_config.overlaps(offset, size, messages.offset, 24):
                self._update_messages(messages, mode)

    def _update_bars(self, loading: bool = False) -> None:
        command = self._device_read(pci_config.COMMAND, 2)
        for bar in self._bars:
            bar.update(self.config, command, loading)

    def _update_messages(self, messages: Any, mode: str) -> None:
        """Follows the capability; what the host refuses costs the guest interrupts only."""
        try:
            self._follow(messages, mode)
        except KernelError as error:
            report.warn_report(f"vfio {self.name}: {error}")

    def _follow(self, messages: Any, mode: str) -> None:
        if messages.enabled and self._interrupts.mode != mode:
            self._interrupts.enable_messages(messages, mode)
        elif messages.enabled:
            self._interrupts.update()
        elif self._interrupts.mode == mode:
            self._interrupts.disable()
            self._interrupts.enable_intx()

    def reset(self) -> None:
        """A reset of the whole function; INTx is on afterwards, MSI and MSI-X are off."""
        assert self._device is not None
        if self._claimed:  # another VMM's guest may yet go on with it
            return
        self._interrupts.disable()
        for bar in self._bars:
            bar.remove()
        if self._resets:
            try:
                self._kernel.reset(self._device)
            except KernelError as error:
                report.warn_report(f"vfio {self.name}: {error}")
        command = self._device_read(pci_config.COMMAND, 2)
        command &= ~pci_config.COMMAND_GUESTS
        self._kernel.write_region(self._device, self._config_region, pci_config.COMMAND, 2, command)
        if self._host_events is not None:
            self._host_events.forget_error()
        self._reset_config()
        if self._irq >= 0:
            self._kernel.write_region(
                self._device, self._config_region, pci_config.INTERRUPT_LINE, 1, self._irq
            )
        self._interrupts.enable_intx()

    def _reset_config(self) -> None:
        """Everything that the guest can change here, back to zeros."""
        self.config.write(0, self.config.size, 0)
        if self._msix is not None:
            self._msix.reset()

    # An update.

    def needed(self) -> bool:
        return self._mode in DESCRIPTORS_KEPT

    def cpr_blocker(self, mode: str) -> str | None:
        if mode == NORMAL:
            return f"{self.name}: VFIO migration is not supported in kernel"
        if mode in DESCRIPTORS_KEPT and self._nameless:
            fd = self._device.number if self._device is not None else -1
            return f"vfio device with fd={fd} needs an id property"
        return None

    def cpr_prepare(self, mode: str) -> None:
        assert self._platform is not None
        if mode == REBOOT and not self._platform.suspended:
            raise MigrationError(REBOOT_REFUSED)
        if mode in DESCRIPTORS_KEPT and self._sysfs and not os.path.isdir(self._sysfs):
            raise MigrationError(
                f"vfio {self.name} has gone from the host: the new VMM would not find it"
            )
        self._mode = mode
        if mode in DESCRIPTORS_KEPT and self._device is not None:
            if self._host_events is not None:
                self._host_events.leave()
            self._interrupts.pause()
            self._backend.leave_vm(self._device)

    def cpr_rollback(self) -> None:
        """Each step by itself: the guest goes on without what fails."""
        kept, self._mode = self._mode in DESCRIPTORS_KEPT, ""
        report.carefully(self._interrupts.resume)
        if kept:
            report.carefully(self._listen_to_host)
            report.carefully(self._join_vm)

    def _listen_to_host(self) -> None:
        if self._host_events is not None:
            self._host_events.listen()

    def _join_vm(self) -> None:
        if self._device is not None:
            self._backend.join_vm(self._device)

    def save(self) -> dict:
        command = self._device_read(pci_config.COMMAND, 2)
        self.config.data[pci_config.COMMAND : pci_config.COMMAND + 2] = command.to_bytes(
            2, "little"
        )
        mode = INTX_ENABLED if self._interrupts.mode == INTX else INTX_DISABLED
        state = {
            "parent_obj": {
                "version_id": 2,
                "config": bytes(self.config.data),
                "irq_state": [0] * pci_config.PINS,
            },
            "intx": {"pending": False, "route.mode": mode, "route.irq": self._irq},
        }
        if self._msix is not None:
            state["msix"] = self._msix.save()
        return state

    def restore(self, state: dict) -> None:
        self.required = False
        self.config.data[:] = state["parent_obj"]["config"]
        if self._msix is not None:
            self._msix.restore(state["msix"])
        self._update_bars(loading=True)

    def take_over(self) -> None:
        """Each step by itself, as in `cpr_rollback`."""
        if self._claimed:
            self._claimed = False
            for step in (self._claim_interrupts, self._listen_to_host, self._join_vm):
                report.carefully(step)
        report.carefully(self._update_bars)  # all others are where they belong by now

    def _claim_interrupts(self) -> None:
        if self._msix is not None and self._msix.enabled:
            self._interrupts.claim_messages(self._msix, MSIX)
        elif self._msi is not None and self._msi.enabled:
            self._interrupts.claim_messages(self._msi, MSI)
        else:
            self._interrupts.claim_intx()
