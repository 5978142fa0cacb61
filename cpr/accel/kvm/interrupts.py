"""Interrupts that devices raise by eventfd, without the VMM: irqfds, message routes, KVM-VFIO.

KVM's table of routes is replaced as a whole at every change.  GSI n is pin n of the I/O APIC, and
below 16 also of the PICs; but GSI 0, the timer's, is pin 2 there, as ACPI tells the guest, and
GSI 2, by which one PIC is connected to the other, is none.  KVM's own table has the timer at pin 0.
"""

from __future__ import annotations

import os

from cpr._native._cpr import lib
from cpr.errors import KernelError
from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.uapi.fd import Fd

IOAPIC_PINS = 24
PIC_PINS = 8
FIRST_MESSAGE_GSI = IOAPIC_PINS
TIMER_GSI, TIMER_PIN = 0, 2


class KvmInterrupts:
    """The irqfds, message routes and VFIO files of one VM, whose descriptor stays the caller's."""

    def __init__(self, vm: Fd) -> None:
        self._vm = vm
        self._messages: dict[int, tuple[int, int]] = {}
        self._vfio: Fd | None = None
        self._vfio_files: set[int] = set()

    def add_irqfd(self, gsi: int, eventfd: int, resamplefd: int) -> None:
        """What the eventfd has counted before is delivered as one interrupt."""
        came = drain(eventfd)
        try:
            kvm.assign_irqfd(self._vm, gsi, eventfd, resamplefd)
        finally:
            if came:  # KVM takes it out of the eventfd, so that it comes once only
                os.eventfd_write(eventfd, 1)

    def remove_irqfd(self, gsi: int, eventfd: int) -> None:
        drain(eventfd)  # what is in there while KVM listens is in the guest already
        kvm.deassign_irqfd(self._vm, gsi, eventfd)

    def add_messages(self, messages: list[tuple[int, int]]) -> list[int]:
        before = dict(self._messages)
        gsis = []
        gsi = FIRST_MESSAGE_GSI
        for message in messages:
            while gsi in self._messages:
                gsi += 1
            self._messages[gsi] = message
            gsis.append(gsi)
        self._change(before)
        return gsis

    def set_message(self, gsi: int, address: int, data: int) -> None:
        before = dict(self._messages)
        self._messages[gsi] = (address, data)
        self._change(before)

    def remove_message(self, gsi: int) -> None:
        before = dict(self._messages)
        del self._messages[gsi]
        self._change(before)

    def _change(self, before: dict[int, tuple[int, int]]) -> None:
        """Gives KVM the table, if it is another one; what KVM refuses is as it was."""
        if self._messages == before:
            return
        try:
            self.set_routing()
        except KernelError:
            self._messages = before
            raise

    def set_routing(self) -> None:
        """Gives KVM the whole table."""
        pins = [
            (gsi, lib.KVM_IRQCHIP_IOAPIC, TIMER_PIN if gsi == TIMER_GSI else gsi)
            for gsi in range(IOAPIC_PINS)
            if gsi != TIMER_PIN
        ]
        pins += [(gsi, lib.KVM_IRQCHIP_PIC_MASTER, gsi) for gsi in range(PIC_PINS)]
        pins += [(PIC_PINS + pin, lib.KVM_IRQCHIP_PIC_SLAVE, pin) for pin in range(PIC_PINS)]
        messages = [(gsi, address, data) for gsi, (address, data) in self._messages.items()]
        kvm.set_gsi_routing(self._vm, pins, messages)

    def add_vfio_file(self, fd: int) -> None:
        """Nothing happens where the VM has it."""
        if fd in self._vfio_files:
            return
        if self._vfio is None:
            self._vfio = kvm.create_vfio_device(self._vm)
        kvm.add_vfio_file(self._vfio, fd)
        self._vfio_files.add(fd)

    def remove_vfio_file(self, fd: int) -> None:
        """With the last file the KVM-VFIO device goes too: it would outlive an exec otherwise."""
        if self._vfio is None or fd not in self._vfio_files:
            return
        kvm.delete_vfio_file(self._vfio, fd)
        self._vfio_files.discard(fd)
        if not self._vfio_files:
            self._vfio.close()
            self._vfio = None

    def close(self) -> None:
        if self._vfio is not None:
            self._vfio.close()
            self._vfio = None


def drain(eventfd: int) -> int:
    """Takes what a non-blocking eventfd has counted, and returns it."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0
