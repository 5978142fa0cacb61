"""What every device is to the machine, and what the machine is to a device.

A device is made with its configuration, realized once (it registers its ports, memory regions and
interrupt lines), reset, and from then on saved and restored as one section of the migration
stream.  The machine calls nothing but this interface.
"""

from __future__ import annotations

from cpr.constants import EXEC, TRANSFER

DESCRIPTORS_KEPT = frozenset({EXEC, TRANSFER})
"""The modes in which a device's descriptors go over to the new VMM."""

MAX_UNATTACHED = 64 << 10  # bytes that are kept for a chardev which is still to come

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from cpr.accel.base import Accelerator, VCpu
    from cpr.acpi.tables import Acpi
    from cpr.clock import VirtualClock
    from cpr.errors import CprError
    from cpr.events import EventBus
    from cpr.mainloop import MainLoop
    from cpr.memory import GuestMemory
    from cpr.state.vmstate import VMStateDescription

    class Balloon(Protocol):
        """How the monitors reach a guest's balloon."""

        @property
        def actual(self) -> int:
            """Bytes that the guest has for itself."""

        def set_target(self, size: int) -> None:
            """Asks the guest to have so many.  Raises CommandError."""

    class Platform(Protocol):
        """The machine, as a device sees it.  Device code runs with `lock` (the BQL) held."""

        lock: Any
        loop: MainLoop
        clock: VirtualClock
        events: EventBus
        accel: Accelerator
        memory: GuestMemory
        vcpus: list[VCpu]
        advances_clock: Callable[[], bool]
        catches_up: bool
        stopped_at: int | None

        @property
        def suspended(self) -> bool:
            """Whether the guest sleeps, or slept when it was stopped."""

        def register_io(
            self,
            base: int,
            length: int,
            read: Callable[[int, int], int],
            write: Callable[[int, int, int], None],
            name: str,
            access_size: int = 1,
        ) -> None:
            """Gives ports [base, base+length) to read(offset, size) and write(offset, size, value).

            Accesses of more than `access_size` bytes reach the device in pieces.
            Raises ValueError if one of the ports is taken.
            """

        def register_mmio(
            self,
            base: int,
            length: int,
            read: Callable[[int, int], int],
            write: Callable[[int, int, int], None],
            name: str,
            access_size: int = 4,
        ) -> None:
            """The same for guest-physical addresses."""

        def unregister_io(self, base: int, length: int) -> None: ...
        def unregister_mmio(self, base: int, length: int) -> None: ...

        def set_irq(self, gsi: int, level: bool) -> None:
            """Sets global system interrupt `gsi` (0..23; 0..15 are the ISA IRQs)."""

        def signal_message(self, address: int, data: int) -> None:
            """Delivers one message-signalled interrupt to the local APICs."""

        def current_vcpu(self) -> int:
            """The index of the vCPU whose thread is calling, or -1."""

        def request_shutdown(self, guest: bool, reason: str) -> None: ...
        def request_suspend(self) -> None:
            """The guest goes to sleep, with its RAM kept."""

        def request_reset(self, guest: bool, reason: str) -> None: ...
        def request_error(self, error: CprError) -> None:
            """Stops the VM soon, in runstate internal-error."""

        def request_stop(self, state: str) -> None:
            """Stops the VM soon, in run state `state`."""

        def request_exit(self, status: int) -> None:
            """Ends the whole VMM with `status`, as isa-debug-exit does."""


MAX_TIME_NS = 1 << 61
"""No guest's clock is further from zero (73 years): sums of such times fit into 64 bits."""


def check_time(name: str, value: int) -> None:
    """Raises ValueError for a time, in ns, that no guest's clock shows."""
    if abs(value) > MAX_TIME_NS:
        raise ValueError(f"field '{name}' is {value} ns, which is no time of a guest's clock")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError for a value that is not within `low` and `high`."""
    if not low <= value <= high:
        raise ValueError(f"field '{name}' is {value}, not within {low} and {high}")


class Device:
    """A device without state of its own; subclasses say what they have.

    `idstr` and `instance_id` name its section in the stream; `vmstate` is None where there is
    nothing to save.  `saved_last`: its section comes after those of the other devices.
    `required`: a stream without its section is refused.
    """

    idstr = ""
    instance_id = 0
    vmstate: VMStateDescription | None = None
    saved_last = False
    required = False
    plain = True
    """Whether its state is this VMM's own alone, so that a VMM that has no guest yet may set it."""
    maps_ram = False
    """Whether a device of the host has the guest's RAM mapped, so that no page of it may go."""
    of_vcpu = False
    """Whether its state can be read only while the vCPU does not run."""

    @property
    def of_accel(self) -> bool:
        """Whether its state is the accelerator's own, and among what that gives at once."""
        return False

    def realize(self, platform: Platform) -> None:
        """Registers the device with the machine; its resources are freed by `unrealize`."""

    def unrealize(self) -> None:
        """The inverse of `realize`."""

    def describe(self, acpi: Acpi) -> None:
        """Adds what a guest's ACPI tables say of this device; by default that is nothing."""

    def reset(self) -> None:
        """Puts the state to what it is at power-on."""

    def save(self) -> dict:
        """The state by `vmstate`; called while the VM is stopped."""
        return {}

    def check(self, state: dict) -> None:
        """Raises ValueError or ConfigError, naming the field, for what the device cannot take.

        Called for a whole state before any device has taken over its own.
        """

    def restore(self, state: dict) -> None:
        """Takes over a whole state made by `save`; called while the VM is stopped.

        The guest may yet go on in the VMM that it comes from: nothing changes outside this process.
        """

    def files(self) -> list[tuple[str, int]]:
        """What of the guest is in files: what each is called, and its descriptor."""
        return []

    def take_locks(self) -> None:
        """Locks what of the host only one VMM may have, before a guest of another one is this
        one's.  Raises CprError; then no more is locked than before.  `give_locks` is the inverse.
        """

    def give_locks(self) -> None:
        """The guest does not become this VMM's."""

    def take_over(self) -> None:
        """The restored guest is this VMM's for good, and runs next.

        What can be seen outside this process, by a device of the host, comes here.  Raises CprError
        where that fails, which the guest survives.
        """

    def on_run(self) -> None:
        """The VM starts to run; called with the lock held, before the vCPUs run."""

    def on_stop(self) -> None:
        """The VM has stopped; called with the lock held, after the vCPUs stopped."""

    def park(self) -> None:
        """Ends the device's own threads, if it has any, for the moment of an exec.

        The guest does not run, but is not told, and nothing may be lost by it.
        """

    def unpark(self) -> None:
        """The inverse of `park`."""

    def on_wakeup(self) -> None:
        """The guest slept, the device has been reset, and the guest runs next."""

    def on_powerdown(self) -> None:
        """Somebody pressed the power button."""

    def needed(self) -> bool:
        """Whether the stream that is being saved gets this device's section."""
        return True

    # An update or a migration, whose `mode` is one of QEMU's names: "normal", "cpr-exec"…

    def cpr_blocker(self, mode: str) -> str | None:
        """Why this device would not survive it, or None."""
        return None

    def cpr_prepare(self, mode: str) -> None:
        """The guest is stopped and will be saved: what must come before that.

        Raises CprError where the device refuses; `cpr_rollback` is the inverse.
        """

    def cpr_rollback(self) -> None:
        """It has failed, and the guest goes on here; also called without `cpr_prepare`."""

    @property
    def balloon(self) -> Balloon | None:
        """This device's balloon, if it has one."""
        return None

    def copy_blocker(self) -> str | None:
        """Why RAM cannot be copied while this device runs (DMA that no log tells of), or None."""
        return None


class IrqchipDevice(Device):
    """A device that an accelerator may have in the kernel: an interrupt chip, or the timer."""

    _platform: Platform | None = None

    @property
    def kernel(self) -> Accelerator | None:
        """The accelerator that has it; None where it is emulated here."""
        platform = self._platform
        return platform.accel if platform is not None and platform.accel.kernel_irqchip else None

    @property
    def of_accel(self) -> bool:
        return self.kernel is not None
