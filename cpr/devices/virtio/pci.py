"""The PCI transport of virtio (virtio 1.2, 4.1): one function with MSI-X, modern only.

Its section holds configuration space, MSI-X table, the common configuration with the positions of
the queues, and what the device adds.
"""

from __future__ import annotations

import os

from cpr import report
from cpr.constants import NS_PER_MS
from cpr.devices import pci_config
from cpr.devices.base import Device
from cpr.devices.pci import PciFunction, parse_slot
from cpr.devices.pci_bars import EmulatedBar
from cpr.devices.virtio.function import (
    COMMON,
    CONFIG_SIZE,
    INTA,
    ISR,
    MOST_VECTORS,
    MSIX_CAPABILITY,
    NOTIFY,
    NOTIFY_MULTIPLIER,
    NOTIFY_SIZE,
    OWN,
    PART_SIZE,
    PBA_OFFSET,
    REGISTER_BAR,
    REGISTER_BAR_SIZE,
    WINDOW,
    WINDOW_DATA,
    Function,
)
from cpr.devices.virtio.interrupts import Interrupts
from cpr.devices.virtio.native import DeviceMemory, Queue
from cpr.devices.virtio.registers import VMSTATE_COMMON, CommonConfig
from cpr.errors import ConfigError, CprError, KernelError
from cpr.state.vmstate import VMStateDescription, struct_, u8
from cpr.uapi import virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.devices.base import Platform
    from cpr.devices.board import Board
    from cpr.devices.pci import PciHost
    from cpr.devices.virtio.device import VirtioDevice

PCI_BUS = "pci.0"
RETRY_NS = 200 * NS_PER_MS  # until a device that could not start is tried again


class VirtioPci(Device, PciFunction):
    """`device` behind PCI.  Owns the queues, and frees them when it is unrealized."""

    required = True

    def __init__(
        self,
        device: VirtioDevice,
        bus: PciHost,
        slot: int | None = None,
        vectors: int | None = None,
    ) -> None:
        """With `vectors` MSI-X vectors; by default one for each queue and one besides."""
        self.device = device
        self.queues: list[Queue] = []
        self._bus = bus
        self._slot = slot
        wanted = len(device.queue_sizes) + 1 if vectors is None else vectors
        self._vector_count = max(1, min(wanted, MOST_VECTORS))
        self._memory: DeviceMemory | None = None
        self._error_fd = -1
        self._on = False  # the guest runs
        self._started = False  # and its driver is there: the queues work
        self._parked = False
        self._failed_to_start = False
        self._retries = False  # later
        self._notifies: list[tuple[int, int]] = []  # (address, eventfd) of ioeventfds
        self._realized = False

    # Making it.

    def realize(self, platform: Platform) -> None:
        """Raises CprError; then everything is given back."""
        self.platform = platform
        self._bus.add(self, self._slot)
        self._function = function = Function(
            self.device.device_id, self.device.pci_class, self._vector_count
        )
        self.config, self._msix = function.config, function.msix
        self._bars = (
            EmulatedBar(function.msix_bar, self.name, platform, self._read_msix, self._write_msix),
            EmulatedBar(function.register_bar, self.name, platform, self._read, self._write),
        )
        sizes = self.device.queue_sizes
        self.common = CommonConfig(self.device.features, sizes, self._msix.count)
        self.common.on_reset = self._reset_device
        self.common.on_driver_ok = self._start
        self.common.on_features = self._set_features
        self.common.on_vectors = self._update_notifiers
        self._interrupts = Interrupts(platform, self._msix, self._set_line)
        self._error_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        platform.loop.watch(self._error_fd, 1, lambda events: self._on_broken())
        try:
            self._memory = DeviceMemory(platform.memory, platform.accel)
            for _ in sizes:
                self.queues.append(Queue(self._memory, self.device.kicks))
            self.device.realize(self)
            self._realized = True
        except CprError:
            self.unrealize()
            raise
        self._describe()

    @property
    def name(self) -> str:
        return self.device.name

    def _describe(self) -> None:
        """The section's name and fields, which depend on the device."""
        fields = [
            struct_("parent_obj", pci_config.vmstate(CONFIG_SIZE)),
            struct_("msix", self._msix.vmstate),
            u8("isr"),
            struct_("virtio", VMSTATE_COMMON),
        ]
        if self.device.vmstate is not None:
            fields.append(struct_("device", self.device.vmstate))
        self.vmstate = VMStateDescription(self.name, 1, 1, tuple(fields))
        self.idstr = f"0000:00:{self.slot:02x}.0/{self.name}"

    def unrealize(self) -> None:
        self._stop()
        self._on = False
        if self._realized:
            self._realized = False
            self.device.unrealize()
        self._remove_notifies()
        for bar in self._bars:
            bar.remove()
        self._interrupts.close()
        if self._error_fd >= 0:
            self.platform.loop.unwatch(self._error_fd)
            os.close(self._error_fd)
            self._error_fd = -1
        for queue in self.queues:
            queue.free()
        self.queues = []
        if self._memory is not None:
            self._memory.free()
            self._memory = None
        self._bus.remove(self)

    # Configuration space.

    def config_read(self, offset: int, size: int) -> int:
        if offset + size > CONFIG_SIZE:
            return 0
        if pci_config.overlaps(offset, size, WINDOW_DATA, 4):
            return self._window(offset, size, None)
        return self.config.get(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset + size > CONFIG_SIZE:
            return
        if pci_config.overlaps(offset, size, WINDOW_DATA, 4):
            self._window(offset, size, value)
            return
        self.config.write(offset, size, value)
        if offset < pci_config.BARS + 4 * pci_config.BAR_COUNT:
            self._update_bars()
        if pci_config.overlaps(offset, size, pci_config.COMMAND, 2):
            self._interrupts.update_line()
        if pci_config.overlaps(offset, size, MSIX_CAPABILITY, 4):
            self._interrupts.update()
            self._update_notifiers()

    def _window(self, offset: int, size: int, value: int | None) -> int:
        """VIRTIO_PCI_CAP_PCI_CFG: a way to the registers without a BAR.  Reads if there is no
        value; what is not a register is not there."""
        bar, length = self.config.get(WINDOW + 4, 1), self.config.get(WINDOW + 12, 4)
        place = self.config.get(WINDOW + 8, 4) + offset - WINDOW_DATA
        if bar != REGISTER_BAR or length not in (1, 2, 4) or size > length:
            return 0
        if place % size or place + size > REGISTER_BAR_SIZE:
            return 0
        if value is None:
            return self._read(place, size)
        self._write(place, size, value)
        return 0

    def _update_bars(self, loading: bool = False) -> None:
        command = self.config.get(pci_config.COMMAND, 2)
        for bar in self._bars:
            if bar.update(self.config, command, loading) and bar.bar.index == REGISTER_BAR:
                self._update_notifies()

    # BAR 1.

    def _read_msix(self, offset: int, size: int) -> int:
        if offset < self._msix.table_size:
            return self._msix.read_table(offset, size)
        if offset >= PBA_OFFSET and offset + size <= PBA_OFFSET + self._msix.pba_size:
            return self._msix.read_pba(offset - PBA_OFFSET, size)
        return 0

    def _write_msix(self, offset: int, size: int, value: int) -> None:
        if offset < self._msix.table_size:
            vector = self._msix.write_table(offset, size, value)
            if vector >= 0:
                self._interrupts.update_vector(vector)

    # BAR 4.

    def _read(self, offset: int, size: int) -> int:
        part, place = offset // PART_SIZE * PART_SIZE, offset % PART_SIZE
        if part == COMMON:
            return self.common.read(place, size)
        if part == ISR:
            return self._interrupts.take_isr() if place == 0 else 0
        return self.device.config_read(place, size) if part == OWN else 0

    def _write(self, offset: int, size: int, value: int) -> None:
        part, place = offset // PART_SIZE * PART_SIZE, offset % PART_SIZE
        if part == COMMON:
            self.common.write(place, size, value)
        elif part == OWN:
            self.device.config_write(place, size, value)
        elif part == NOTIFY:
            self._notify(place // NOTIFY_MULTIPLIER)

    def _notify(self, index: int) -> None:
        if not self._started or index >= len(self.queues):
            return
        if self.device.kicks:
            os.eventfd_write(self.queues[index].kick, 1)
        else:
            self.device.kick(index)

    def _update_notifies(self) -> None:
        """Has KVM write the queues' eventfds where the guest's notifications are now.

        Those that it has no room for come by the registers.
        """
        self._remove_notifies()
        base, accel = self._bars[1].base, self.platform.accel
        if base is None or not self.device.kicks or not accel.ioeventfds:
            return
        for index, queue in enumerate(self.queues):
            address = base + NOTIFY + index * NOTIFY_MULTIPLIER
            try:
                accel.add_ioeventfd(address, NOTIFY_SIZE, queue.kick)
            except KernelError:
                return
            self._notifies.append((address, queue.kick))

    def _remove_notifies(self) -> None:
        for address, fd in self._notifies:
            self.platform.accel.remove_ioeventfd(address, NOTIFY_SIZE, fd)
        self._notifies = []

    def _set_line(self, level: bool) -> None:
        disabled = self.config.get(pci_config.COMMAND, 2) & pci_config.COMMAND_INTX_DISABLE
        self._bus.set_intx(self.slot, INTA, level and not disabled)

    # The driver comes and goes.

    def config_changed(self) -> None:
        if self.common.status & virtio.DRIVER_OK:
            self.common.generation = self.common.generation + 1 & 0xFF
            self._interrupts.raise_config(self.common.config_vector)

    def _set_features(self) -> None:
        self.device.set_features(self.common.guest_features)

    def _update_notifiers(self) -> None:
        for queue, registers in zip(self.queues, self.common.queues, strict=True):
            queue.set_notifiers(self._interrupts.fd(registers.vector), self._error_fd)
        self.device.on_notifiers()

    def _start(self) -> None:
        """Lets the queues work, where the guest runs and its driver is there."""
        status = self.common.status
        is_ready = status & virtio.DRIVER_OK and not status & virtio.NEEDS_RESET
        if self._started or self._parked or not self._on or not is_ready:
            return
        self._update_notifiers()
        self._started = True
        for number, (queue, registers) in enumerate(
            zip(self.queues, self.common.queues, strict=True)
        ):
            if registers.enabled and not queue.enable(
                registers.position, self.common.event_idx, self.common.indirect
            ):
                self._break(f"queue {number} is not in RAM")
                return
        try:
            self.device.start()
        except CprError as error:  # no thread now: the guest waits for its device
            self._stop()
            if not self._failed_to_start:
                report.error_report(f"{self.name}: {error}; it is tried again")
            self._failed_to_start = True
            self._retry_later()
        else:
            self._failed_to_start = False

    def _retry_later(self) -> None:
        """Once, however often the guest's driver asks for it meanwhile."""
        if self._retries:
            return
        self._retries = True

        def again() -> None:
            with self.platform.lock:
                self._retries = False
                self._start()

        self.platform.loop.call_later(RETRY_NS, again)

    def _stop(self) -> None:
        """The inverse of `_start`; the positions of the queues are in the registers then."""
        if not self._started:
            return
        self.device.stop()
        self._started = False
        problems = []
        for number, (queue, registers) in enumerate(
            zip(self.queues, self.common.queues, strict=True)
        ):
            if queue.problem:
                problems.append(f"queue {number}: {queue.problem}")
            if registers.enabled:
                queue.update(registers.position)
            queue.disable()
        if problems:
            self._break("; ".join(problems))

    def _break(self, problem: str) -> None:
        """The driver has done what it must not: the device waits to be reset."""
        report.error_report(f"{self.name}: {problem}")
        self.common.status |= virtio.NEEDS_RESET
        self._stop()
        self.config_changed()

    def _on_broken(self) -> None:
        with self.platform.lock:
            try:
                os.eventfd_read(self._error_fd)
            except BlockingIOError:
                return
            if any(queue.problem for queue in self.queues):
                self._stop()
            elif self._started and self.device.problem:
                self._break(self.device.problem)

    def _reset_device(self) -> None:
        self._stop()
        self.common.reset()
        self._interrupts.take_isr()
        self.device.reset()
        self.device.set_features(0)

    # As a Device.

    def reset(self) -> None:
        self._reset_device()
        self._function.reset(self._bus.irq_of(self.slot, INTA))
        self._interrupts.update()
        self._update_bars()

    def on_run(self) -> None:
        self._on = True
        self._interrupts.update_line()
        self._start()

    def on_stop(self) -> None:
        self._stop()
        self._on = False
        self._interrupts.settle()

    def park(self) -> None:
        self._stop()
        self._parked = True

    def unpark(self) -> None:
        self._parked = False
        self._start()

    def cpr_blocker(self, mode: str) -> str | None:
        return self.device.cpr_blocker(mode)

    @property
    def balloon(self) -> Any:
        return self.device if self.device.is_balloon else None

    def copy_blocker(self) -> str | None:
        return self.device.copy_blocker()

    def cpr_prepare(self, mode: str) -> None:
        self._interrupts.pause()
        self.device.cpr_prepare(mode)

    def cpr_rollback(self) -> None:
        try:
            self.device.cpr_rollback()
        finally:
            self._interrupts.resume()

    def save(self) -> dict:
        for queue, registers in zip(self.queues, self.common.queues, strict=True):
            if self._started and registers.enabled:
                queue.update(registers.position)
        parent = {
            "version_id": 2,
            "config": bytes(self.config.data),
            "irq_state": [0] * pci_config.PINS,
        }
        state = {
            "parent_obj": parent,
            "msix": self._msix.save(),
            "isr": self._interrupts.isr,
            "virtio": self.common.save(),
        }
        if self.device.vmstate is not None:
            state["device"] = self.device.save()
        return state

    def check(self, state: dict) -> None:
        self.common.check(state["virtio"])
        if self.device.vmstate is not None:
            self.device.check(state["device"])

    def restore(self, state: dict) -> None:
        self.config.write(0, CONFIG_SIZE, int.from_bytes(state["parent_obj"]["config"], "little"))
        self._msix.restore(state["msix"])
        self._interrupts.isr = state["isr"]
        self.common.restore(state["virtio"])
        self.device.set_features(self.common.guest_features)
        if self.device.vmstate is not None:
            self.device.restore(state["device"])
        self._update_bars(loading=True)

    def files(self) -> list[tuple[str, int]]:
        return self.device.files()

    def take_locks(self) -> None:
        self.device.take_locks()

    def give_locks(self) -> None:
        self.device.give_locks()

    def take_over(self) -> None:
        self._update_bars()  # all others are where they belong by now
        self._interrupts.update()
        self.device.take_over()


def add_function(board: Board, device: VirtioDevice, properties: dict[str, Any]) -> None:
    """Puts `device` into the board's machine, with the properties that all virtio devices have.

    Raises CprError.
    """
    if properties.get("disable-modern"):
        raise ConfigError("device is modern-only, leave out disable-modern=on")
    bus = properties.get("bus", PCI_BUS)
    if bus != PCI_BUS:
        raise ConfigError(f"Bus '{bus}' not found")
    addr = properties.get("addr")
    slot = None if addr is None else parse_slot(addr)
    function = VirtioPci(device, board.pci_host(), slot, properties.get("vectors"))
    board.machine.add_device(function)
