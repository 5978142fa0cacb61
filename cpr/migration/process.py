"""The process around a VM, as an update that executes another program needs it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.machine import Machine


class Process:
    """One that has a VM and nothing else; the VMM's also has monitors and chardevs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def before_exec(self) -> None:
        """On the main loop, just before an exec: puts out what must not be lost."""

    def park(self) -> None:
        """Ends all threads but the caller's, the main loop's."""
        self.machine.park()

    def unpark(self) -> None:
        """The inverse of `park`: starts them again."""
        self.machine.unpark()

    def on_new_pid(self) -> None:
        """The VM goes on in another process than before."""

    def on_update(self) -> None:
        """An update begins that executes another program."""

    def on_update_failed(self, reason: str) -> None:
        """It has failed, and the VM goes on here."""

    def exec_fds(self) -> list[int]:
        """The sockets that QEMU's exec closes."""
        return []

    def reopen(self) -> None:
        """Makes those of `exec_fds` again, where an exec has failed after it closed them."""

    def interrupted(self) -> bool:
        """Whether a signal has come that ends the VM when the main loop sees it."""
        return False
