"""The interrupts of a virtio device: an eventfd for each MSI-X vector, and one for INTx.

Whoever has something for the guest, a thread in C or device code, writes the eventfd.  On KVM the
vector's own message is raised by it without the VMM (irqfd); where there is no irqfd, or the vector
is masked, the main loop reads it, and delivers the message or notes it as pending.
"""

from __future__ import annotations

import os

from cpr import report
from cpr.errors import KernelError
from cpr.uapi import virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.devices.base import Platform
    from cpr.devices.pci_msi import MsixCapability


class Vector:
    """One MSI-X vector.  `gsi` is KVM's for its message, -1 for none; `by_irqfd`: KVM has the
    eventfd, else the main loop.
    """

    __slots__ = ("by_irqfd", "fd", "gsi")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.gsi = -1
        self.by_irqfd = False


class Interrupts:
    """Owns the eventfds until `close`.  `set_line(level)` sets INTx; `isr` is what the guest reads
    to find out why that is up (VIRTIO_PCI_ISR_…), and ends it by that.
    """

    def __init__(
        self, platform: Platform, msix: MsixCapability, set_line: Callable[[bool], None]
    ) -> None:
        self.isr = 0
        self._platform = platform
        self._msix = msix
        self._set_line = set_line
        self._paused = False
        self._uses_irqfds = platform.accel.has_irqfds
        self._line_fd = _eventfd()
        platform.loop.watch(self._line_fd, 1, lambda events: self._on_line())
        self._vectors = [Vector(_eventfd()) for _ in range(msix.count)]
        for number in range(msix.count):
            self._watch(number)

    def close(self) -> None:
        for vector in self._vectors:
            self._disconnect(vector)
            self._unroute(vector)
            self._platform.loop.unwatch(vector.fd)
            os.close(vector.fd)
        self._vectors = []
        self._platform.loop.unwatch(self._line_fd)
        os.close(self._line_fd)

    def fd(self, vector: int) -> int:
        """The eventfd to write for an interrupt by `vector`; -1 where the guest wants none."""
        if not self._msix.enabled:
            return self._line_fd
        return self._vectors[vector].fd if vector < len(self._vectors) else -1

    def raise_config(self, vector: int) -> None:
        """Tells the guest that the configuration has changed."""
        if not self._msix.enabled:
            self.isr |= virtio.ISR_CONFIG
            self.update_line()
        elif (fd := self.fd(vector)) >= 0:
            os.eventfd_write(fd, 1)

    def take_isr(self) -> int:
        isr, self.isr = self.isr, 0
        self.update_line()
        return isr

    def update_line(self) -> None:
        self._set_line(bool(self.isr) and not self._msix.enabled)

    def update(self) -> None:
        """The guest has switched MSI-X on or off, or masked all of it or not."""
        for number in range(len(self._vectors)):
            self.update_vector(number)
        self.update_line()

    def update_vector(self, number: int) -> None:
        """The guest has changed the message or the mask of one vector."""
        vector, msix = self._vectors[number], self._msix
        if not msix.enabled or msix.is_masked(number):
            if vector.by_irqfd:
                self._disconnect(vector)
                self._watch(number)
            if not msix.enabled:
                self._unroute(vector)
            return
        if self._uses_irqfds and not self._paused:
            self._connect(number)
        if msix.is_pending(number):
            msix.set_pending(number, False)
            self._platform.signal_message(*msix.message(number))

    def _connect(self, number: int) -> None:
        """Has KVM raise the vector's message; where it refuses, the main loop does."""
        vector, message = self._vectors[number], self._msix.message(number)
        accel = self._platform.accel
        try:
            if vector.gsi < 0:
                vector.gsi = accel.add_messages([message])[0]
            else:
                accel.set_message(vector.gsi, *message)
            if not vector.by_irqfd:
                accel.add_irqfd(vector.gsi, vector.fd)
                vector.by_irqfd = True
                self._platform.loop.unwatch(vector.fd)
        except KernelError as error:
            report.warn_report(f"a vector of a virtio device goes through the VMM: {error}")
            self._disconnect(vector)
            self._watch(number)

    def _disconnect(self, vector: Vector) -> None:
        if vector.by_irqfd:
            self._platform.accel.remove_irqfd(vector.gsi, vector.fd)
            vector.by_irqfd = False

    def _unroute(self, vector: Vector) -> None:
        if vector.gsi >= 0:
            self._platform.accel.remove_message(vector.gsi)
            vector.gsi = -1

    def _watch(self, number: int) -> None:
        fd = self._vectors[number].fd
        self._platform.loop.watch(fd, 1, lambda events: self._on_vector(number))

    def _on_vector(self, number: int) -> None:
        with self._platform.lock:
            if number < len(self._vectors) and not self._vectors[number].by_irqfd:
                self._take_vector(number)

    def _take_vector(self, number: int) -> None:
        if not _drain(self._vectors[number].fd) or not self._msix.enabled:
            return
        if self._msix.is_masked(number):
            self._msix.set_pending(number, True)
        else:
            self._platform.signal_message(*self._msix.message(number))

    def _on_line(self) -> None:
        with self._platform.lock:
            if _drain(self._line_fd):
                self.isr |= virtio.ISR_QUEUE
                self.update_line()

    def settle(self) -> None:
        """Delivers what the main loop has not come to yet, so that the state has it."""
        self._on_line()
        for number, vector in enumerate(self._vectors):
            if not vector.by_irqfd:
                self._take_vector(number)

    def pause(self) -> None:
        """The guest has stopped and will be saved: KVM is through with what was raised.

        `resume` is the inverse.
        """
        self._paused = True
        for number, vector in enumerate(self._vectors):
            if vector.by_irqfd:
                self._disconnect(vector)
                self._watch(number)

    def resume(self) -> None:
        """Nothing happens where it is not paused."""
        if self._paused:
            self._paused = False
            self.update()


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def _drain(fd: int) -> bool:
    """Takes what was written; whether that was anything."""
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False
