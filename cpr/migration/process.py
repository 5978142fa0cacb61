"""The process around a VM, as an update that executes another program needs it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.machine import Machine
    from cpr.state.connections import Kept
    from cpr.state.fds import PreservedFds


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

    def lock_ram(self) -> None:
        """The source of a cpr-transfer must not run the guest that this VM has."""

    def has_untold_guard(self) -> bool:
        """Whether an older image may still go on with the guest that this one has by now."""
        return False

    def on_new_pid(self) -> None:
        """The VM goes on in another process than before.  Raises nothing."""

    def on_update(self) -> None:
        """An update begins that executes another program."""

    def on_update_failed(self, reason: str) -> None:
        """It has failed, and the VM goes on here."""

    def exec_fds(self) -> list[int]:
        """The sockets that QEMU's exec closes."""
        return []

    def reopen(self) -> None:
        """Makes those of `exec_fds` again, where an exec has failed after it closed them."""

    def hold_commands(self, on: bool) -> None:
        """While it is on, what monitors are told waits: it may be for the new image."""

    def connections(self) -> dict[str, Kept]:
        """All that an early update keeps; the descriptors stay this process's."""
        return {}

    def keep_connections(self, fds: PreservedFds) -> None:
        """Has those that a late update keeps go with `fds`.  Raises KernelError."""

    def take_connections_back(self, fds: PreservedFds) -> None:
        """The inverse of `keep_connections`; nothing where that has not been called."""

    def interrupted(self) -> bool:
        """Whether a signal has come that ends the VM when the main loop sees it."""
        return False
