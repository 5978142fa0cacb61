"""The interrupts of a vfio-pci device: one of INTx, MSI or MSI-X at a time, by eventfd.

Every vector has two eventfds, as in QEMU, and VFIO writes one of them:

    kvm_interrupt   while the guest has it unmasked: KVM raises it without the VMM (irqfd)
    interrupt       while it is masked: the VMM notes it as pending

INTx has an eventfd that raises the line, and one by which KVM tells VFIO that the guest has ended
it.  All of them are in the registry of preserved fds as long as they exist.  For an update the VMM
and KVM stop listening, and what comes meanwhile is counted by the eventfds; the new VMM listens
again, and asks VFIO for nothing.
"""

from __future__ import annotations

import os

from cpr import report
from cpr.constants import NS_PER_MS
from cpr.errors import KernelError
from cpr.uapi import vfio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.devices.base import Platform
    from cpr.devices.pci_msi import MsiCapability, MsixCapability
    from cpr.mainloop import Timer
    from cpr.state.fds import PreservedFds
    from cpr.uapi.fd import Fd

    Messages = MsiCapability | MsixCapability

NONE, INTX, MSI, MSIX = "none", "intx", "msi", "msix"
INDICES = {INTX: vfio.INTX_IRQ, MSI: vfio.MSI_IRQ, MSIX: vfio.MSIX_IRQ}

INTERRUPT, KVM_INTERRUPT = "interrupt", "kvm_interrupt"
INTX_INTERRUPT, INTX_UNMASK = "intx-interrupt", "intx-unmask"

RETRY_NS = 200 * NS_PER_MS  # until KVM is asked again for what it could not take


class Notifiers:
    """The eventfds of the device `name`, in the registry as `name`_kind.  Owns them."""

    def __init__(self, name: str, fds: PreservedFds) -> None:
        self._name = name
        self._fds = fds
        self._owned: dict[tuple[str, int], int] = {}

    def open(self, kind: str, number: int = 0) -> int:
        """The eventfd of this kind and vector: the one there is, or a new one."""

        def create() -> int:
            return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

        fd = self._fds.open(f"{self._name}_{kind}", number, create)
        self._owned[kind, number] = fd
        return fd

    def find(self, kind: str, number: int = 0) -> int | None:
        """The one that came from the VMM before this one, or None."""
        fd = self._fds.find(f"{self._name}_{kind}", number)
        if fd is not None:
            self._owned[kind, number] = fd
        return fd

    def close(self, kind: str, number: int = 0) -> None:
        fd = self._owned.pop((kind, number), None)
        if fd is not None:
            self._fds.delete(f"{self._name}_{kind}", number)
            os.close(fd)

    def close_all(self) -> None:
        for kind, number in list(self._owned):
            self.close(kind, number)


class Vector:
    """One MSI or MSI-X vector in use.  `gsi` is KVM's for its message, -1 for none; `by_irqfd`:
    KVM listens to its kvm_interrupt.
    """

    __slots__ = ("by_irqfd", "gsi", "interrupt", "kvm_interrupt", "listens", "number")

    def __init__(self, number: int, interrupt: int) -> None:
        self.number = number
        self.interrupt = interrupt
        self.kvm_interrupt = -1
        self.gsi = -1
        self.by_irqfd = False
        self.listens = False


class Interrupts:
    """What connects the device's interrupts with the guest's.

    `irq` is the GSI that INTx is wired to, or -1 for a device without a pin.
    """

    def __init__(
        self,
        device: Fd,
        notifiers: Notifiers,
        platform: Platform,
        irq: int,
        kernel: Any = vfio,
    ) -> None:
        self.mode = NONE
        self._device = device
        self._notifiers = notifiers
        self._platform = platform
        self._irq = irq
        self._kernel = kernel
        self._messages: Messages | None = None
        self._vectors: dict[int, Vector] = {}
        self._enabled = 0  # how many vectors VFIO has enabled
        self._resizes = False
        self._intx_listens = False
        self._paused = False
        self._retry: Timer | None = None
        self._has_failed = False

    # INTx.

    def enable_intx(self) -> None:
        if self._irq < 0 or self.mode != NONE:
            return
        fd = self._notifiers.open(INTX_INTERRUPT)
        unmask = self._notifiers.open(INTX_UNMASK)
        self._kernel.set_triggers(self._device, vfio.INTX_IRQ, 0, (fd,))
        self.mode = INTX
        self._kernel.set_unmask(self._device, vfio.INTX_IRQ, unmask)
        self._listen_intx()

    def _listen_intx(self) -> None:
        """A line that is up comes up again by the unmasking, so that no level is lost."""
        if self.mode != INTX or self._intx_listens:
            return
        fd = self._notifiers.open(INTX_INTERRUPT)
        self._platform.accel.add_irqfd(self._irq, fd, self._notifiers.open(INTX_UNMASK))
        try:
            self._kernel.unmask(self._device, vfio.INTX_IRQ)
        except KernelError:
            self._platform.accel.remove_irqfd(self._irq, fd)
            raise
        self._intx_listens = True

    def _unlisten_intx(self) -> None:
        if self._intx_listens:
            fd = self._notifiers.open(INTX_INTERRUPT)
            self._platform.accel.remove_irqfd(self._irq, fd)
            self._intx_listens = False

    # MSI and MSI-X.

    def enable_messages(self, messages: Messages, mode: str) -> None:
        """The guest has switched MSI or MSI-X on: INTx goes off."""
        self.disable()
        self._messages, self.mode = messages, mode
        info = self._kernel.irq_info(self._device, INDICES[mode])
        self._resizes = info.resizes
        if mode == MSIX:
            # The device goes to MSI-X by its first vector; the guest has not unmasked one yet.
            self._kernel.set_triggers(self._device, vfio.MSIX_IRQ, 0, (-1,))
            self._enabled = 1
        else:
            for number in range(messages.used):  # type: ignore[union-attr]
                self._vectors[number] = Vector(number, self._notifiers.open(INTERRUPT, number))
        self.update()
        if mode == MSI:
            self._enable_all()

    def _enable_all(self) -> None:
        fds = [-1] * (max(self._vectors, default=0) + 1)
        for vector in self._vectors.values():
            fds[vector.number] = self._target(vector)
        self._enabled = len(fds)
        self._kernel.set_triggers(self._device, INDICES[self.mode], 0, fds)

    def _target(self, vector: Vector) -> int:
        """The eventfd that VFIO is to write."""
        assert self._messages is not None
        masked = self._messages.is_masked(vector.number)
        return vector.interrupt if masked else vector.kvm_interrupt

    def update(self) -> None:
        """The guest has changed messages or masks, of any vector."""
        if self._messages is not None:
            for number in range(self._messages.count):
                self.update_vector(number)

    def update_vector(self, number: int) -> None:
        """The guest has changed the message or the mask of one vector."""
        messages = self._messages
        if messages is None:
            return
        vector = self._vectors.get(number)
        if messages.is_masked(number):
            if vector is not None and not vector.listens:
                self._listen_masked(vector)
                self._connect(vector)
            return
        if vector is None:
            if self.mode == MSI:
                return  # more than the guest asked for
            vector = Vector(number, self._notifiers.open(INTERRUPT, number))
            self._vectors[number] = vector
        was_connected = vector.gsi >= 0 and not vector.listens
        self._route(vector)
        self._unlisten_masked(vector)
        if not was_connected:
            self._connect(vector)
        if messages.is_pending(number):
            messages.set_pending(number, False)
            self._platform.accel.signal_message(*messages.message(number))

    def _route(self, vector: Vector) -> None:
        """Has KVM raise the vector's message when its kvm_interrupt is written."""
        assert self._messages is not None
        accel = self._platform.accel
        message = self._messages.message(vector.number)
        if vector.gsi >= 0:
            accel.set_message(vector.gsi, *message)
            return
        kvm_interrupt = self._notifiers.open(KVM_INTERRUPT, vector.number)
        vector.gsi = accel.add_messages([message])[0]
        vector.kvm_interrupt = kvm_interrupt
        self._try(self._listen_routed, vector)

    def _route_all(self) -> None:
        """Gives all vectors without a GSI, whose kvm_interrupts are there, one in one step."""
        vectors = [v for v in self._vectors.values() if v.kvm_interrupt >= 0 and v.gsi < 0]
        if not vectors:
            return
        messages = self._messages
        assert messages is not None
        wanted = [messages.message(vector.number) for vector in vectors]
        for vector, gsi in zip(vectors, self._platform.accel.add_messages(wanted), strict=True):
            vector.gsi = gsi

    def _listen_routed(self, vector: Vector) -> None:
        if vector.gsi >= 0 and not vector.by_irqfd:
            self._platform.accel.add_irqfd(vector.gsi, vector.kvm_interrupt)
            vector.by_irqfd = True

    def _unlisten_routed(self, vector: Vector) -> None:
        if vector.by_irqfd:
            self._platform.accel.remove_irqfd(vector.gsi, vector.kvm_interrupt)
            vector.by_irqfd = False

    def _listen(self) -> None:
        """Has KVM listen to whatever it does not yet."""
        self._try(self._listen_intx)
        self._try(self._route_all)
        for vector in self._vectors.values():
            self._try(self._listen_routed, vector)

    def _try(self, step: Callable[..., None], *arguments: Any) -> None:
        """Where KVM refuses, that is said and `_listen` tries again; what comes is counted."""
        try:
            step(*arguments)
        except KernelError as error:
            if not self._has_failed:
                report.error_report(f"vfio {self._device.name}: {error}; it is tried again")
            self._has_failed = True
            if self._retry is None:
                self._retry = self._platform.loop.call_later(RETRY_NS, self._listen_again)

    def _listen_again(self) -> None:
        with self._platform.lock:
            self._retry = None
            if not self._paused:  # else `resume` does
                self._listen()
            self._has_failed = self._retry is not None

    def _connect(self, vector: Vector) -> None:
        """Has VFIO write the eventfd that is the vector's now."""
        if not self._enabled:
            return  # all of them will be enabled at once
        if vector.number < self._enabled or self._resizes:
            fds = (self._target(vector),)
            self._kernel.set_triggers(self._device, INDICES[self.mode], vector.number, fds)
            self._enabled = max(self._enabled, vector.number + 1)
            return
        self._kernel.disable_irqs(self._device, INDICES[self.mode])
        self._enable_all()

    def _listen_masked(self, vector: Vector) -> None:
        def on_interrupt(events: int) -> None:
            with self._platform.lock:
                if self._paused:  # the stream is written: it stays for the new VMM
                    return
                try:
                    os.eventfd_read(vector.interrupt)
                except BlockingIOError:
                    return
                self._deliver(vector.number)

        self._platform.loop.watch(vector.interrupt, 1, on_interrupt)
        vector.listens = True

    def _deliver(self, number: int) -> None:
        if self._messages is None:
            return
        if self._messages.is_masked(number):
            self._messages.set_pending(number, True)
        else:
            self._platform.accel.signal_message(*self._messages.message(number))

    def _unlisten_masked(self, vector: Vector) -> None:
        if vector.listens:
            self._platform.loop.unwatch(vector.interrupt)
            vector.listens = False

    def disable(self) -> None:
        """No interrupt from now on; whatever was enabled."""
        if self.mode != NONE:
            self._kernel.disable_irqs(self._device, INDICES[self.mode])
        self._free()

    def abandon(self) -> None:
        """Another VMM has the interrupts: what is this one's goes, and nothing else changes."""
        self._vectors.clear()
        self._intx_listens = False
        self.mode = NONE

    def _free(self) -> None:
        self._unlisten_intx()
        self._notifiers.close(INTX_INTERRUPT)
        self._notifiers.close(INTX_UNMASK)
        for vector in self._vectors.values():
            self._unlisten_masked(vector)
            self._unlisten_routed(vector)
            if vector.gsi >= 0:
                self._platform.accel.remove_message(vector.gsi)
            self._notifiers.close(INTERRUPT, vector.number)
            self._notifiers.close(KVM_INTERRUPT, vector.number)
        self._vectors.clear()
        self._messages = None
        self._enabled = 0
        self.mode = NONE

    # An update.

    def pause(self) -> None:
        """Stops listening; what comes from now on is counted.  `resume` is the inverse."""
        if self._paused:
            return
        self._paused = True
        self._unlisten_intx()
        for vector in self._vectors.values():
            if vector.listens:
                self._platform.loop.unwatch(vector.interrupt)
            self._unlisten_routed(vector)

    def resume(self) -> None:
        """Listens again; nothing happens where it does."""
        if not self._paused:
            return
        self._paused = False
        for vector in self._vectors.values():
            if vector.listens:
                self._listen_masked(vector)
        self._listen()

    def claim_intx(self) -> None:
        """INTx was enabled by the VMM before this one."""
        if self._irq < 0:
            return
        if self._notifiers.find(INTX_INTERRUPT) is None:
            self.enable_intx()
            return
        self.mode = INTX
        self._listen()

    def claim_messages(self, messages: Messages, mode: str) -> None:
        """MSI or MSI-X was enabled by the VMM before this one: VFIO keeps what it does.

        A vector without its descriptors was unmasked after these were handed over: it is new.
        """
        self._messages, self.mode = messages, mode
        self._resizes = self._kernel.irq_info(self._device, INDICES[mode]).resizes
        self._enabled = 1
        for number in range(messages.count):
            interrupt = self._notifiers.find(INTERRUPT, number)
            if interrupt is None:
                continue
            vector = self._vectors[number] = Vector(number, interrupt)
            self._enabled = number + 1
            kvm_interrupt = self._notifiers.find(KVM_INTERRUPT, number)
            if kvm_interrupt is not None:
                vector.kvm_interrupt = kvm_interrupt
            if messages.is_masked(number):
                self._listen_masked(vector)
        self._listen()
        self.update()
