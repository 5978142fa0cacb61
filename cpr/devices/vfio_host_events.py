"""What the host tells of a device that a guest has: an error, and that it wants the device back.

In an update it tells both VMMs by the same eventfds: they are for the one that has the guest.
"""

from __future__ import annotations

import os

from cpr import report
from cpr.errors import CprError
from cpr.mainloop import READ
from cpr.uapi import vfio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cpr.devices.base import Platform
    from cpr.devices.vfio_interrupts import Notifiers
    from cpr.state.fds import PreservedFds
    from cpr.uapi.fd import Fd

ERROR, REQUEST = "err_notifier", "req_notifier"


class HostEvents:
    """Those of `device`, the VFIO device `name`, through eventfds that are of its `notifiers`."""

    def __init__(
        self,
        name: str,
        kernel: Any,
        device: Fd,
        platform: Platform,
        fds: PreservedFds,
        notifiers: Notifiers,
    ) -> None:
        """Has VFIO write those that did not come with a CPR state.  Raises KernelError."""
        self._name = name
        self._platform = platform
        self._handlers: dict[int, Callable[[], None]] = {}  # by eventfd
        self._error_fd = -1
        self._listens = False
        self._has_failed = False
        for index, kind, handler in (
            (vfio.ERR_IRQ, ERROR, self._on_error),
            (vfio.REQ_IRQ, REQUEST, self._on_request),
        ):
            info = kernel.irq_info(device, index)
            if not info.count or not info.eventfd:
                continue
            came = fds.came(f"{name}_{kind}", 0)
            fd = notifiers.open(kind)
            if not came:
                kernel.set_triggers(device, index, 0, (fd,))
            if kind == ERROR:
                self._error_fd = fd
            self._handlers[fd] = handler

    def listen(self) -> None:
        """The guest is this VMM's; `leave` is the inverse."""
        self._listens = True
        for fd in self._handlers:
            self._watch(fd)

    def _watch(self, fd: int) -> None:
        self._platform.loop.watch(fd, READ, lambda events: self._on_event(fd))

    def leave(self) -> None:
        """An error is told again: the guest may not have been stopped by it yet."""
        self.close()
        if self._has_failed:
            os.eventfd_write(self._error_fd, 1)

    def forget_error(self) -> None:
        """The guest, and the device, have been reset."""
        self._has_failed = False

    def close(self) -> None:
        """Hears nothing more; the eventfds stay the notifiers'."""
        self._listens = False
        for fd in self._handlers:
            self._platform.loop.unwatch(fd)

    def _on_event(self, fd: int) -> None:
        with self._platform.lock:
            if not self._listens:
                return
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
            self._handlers[fd]()

    def _on_error(self) -> None:
        self._has_failed = True
        self._platform.request_error(
            CprError(
                f"vfio {self._name}: unrecoverable error of the device; the guest is stopped and "
                "can still be examined"
            )
        )

    def _on_request(self) -> None:
        report.warn_report(f"the host wants {self._name} back: end this VM to give it away")
