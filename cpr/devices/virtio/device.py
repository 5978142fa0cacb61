"""What a virtio device is to its transport, and the transport to a device.

Device code runs with the machine's lock held; threads in C take nothing but their queues' locks.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from cpr.devices.base import Platform
    from cpr.devices.virtio.native import Queue
    from cpr.state.vmstate import VMStateDescription

    class Transport(Protocol):
        """How a device reaches its guest.  `queues` are as many as the device has sizes for."""

        queues: list[Queue]

        @property
        def platform(self) -> Platform: ...
        def config_changed(self) -> None:
            """Interrupts the guest because the device's configuration is another one."""


class VirtioDevice:
    """One kind of device.

    `name` is QEMU's; `device_id` virtio's; `pci_class` the 24 bits of a PCI class code.
    `features` are those that it offers besides the transport's.  `queue_sizes` has the largest size
    of each queue.  `kicks`: notifications go to threads in C, by the queues' eventfds, and not to
    `kick`.  `vmstate` describes what `save` gives, or is None.
    """

    name = ""
    device_id = 0
    pci_class = 0
    features = 0
    queue_sizes: tuple[int, ...] = ()
    kicks = False
    vmstate: VMStateDescription | None = None
    transport: Transport
    is_balloon = False

    def realize(self, transport: Transport) -> None:
        """Makes what it needs, with the queues there.  Raises CprError; then nothing is left."""
        self.transport = transport

    def unrealize(self) -> None:
        """The inverse of `realize`; called once that has succeeded."""

    def reset(self) -> None:
        """As at power-on; called while it is stopped."""

    def config_read(self, offset: int, size: int) -> int:
        """Reads its configuration; zeros where it has none."""
        return 0

    def config_write(self, offset: int, size: int, value: int) -> None:
        pass

    def set_features(self, features: int) -> None:
        """What the driver has chosen, all features included; 0 after a reset."""

    def kick(self, index: int) -> None:
        """The guest says that queue `index` has chains."""

    _again: frozenset[int] = frozenset()

    def kick_again(self, index: int) -> None:
        """`kick` comes soon: another vCPU may bring chains as fast as they are taken, and others
        want the machine's lock."""
        if index not in self._again:
            self._again |= {index}
            self.transport.platform.loop.call_soon(lambda: self._kick_again(index))

    def _kick_again(self, index: int) -> None:
        with self.transport.platform.lock:
            self._again -= {index}
            if index < len(self.transport.queues):
                self.kick(index)

    def start(self) -> None:
        """The guest runs and its driver is there: chains that are waiting are taken from now on.

        Raises CprError; then it has not started.
        """

    def stop(self) -> None:
        """The inverse of `start`: when it returns, no chain is under way."""

    def on_notifiers(self) -> None:
        """The eventfds of the queues may have become others."""

    @property
    def problem(self) -> str:
        """What is wrong with chains that something else than a queue has looked at, or ""."""
        return ""

    def save(self) -> dict:
        return {}

    def check(self, state: dict) -> None:
        """Raises ValueError for what `restore` cannot take."""

    def restore(self, state: dict) -> None:
        """Takes over what `save` gave, while it is stopped."""

    # As of cpr.devices.base.Device.

    def cpr_blocker(self, mode: str) -> str | None:
        return None

    def cpr_prepare(self, mode: str) -> None:
        pass

    def cpr_rollback(self) -> None:
        pass

    def files(self) -> list[tuple[str, int]]:
        return []

    def take_locks(self) -> None:
        pass

    def give_locks(self) -> None:
        pass

    def take_over(self) -> None:
        pass

    def copy_blocker(self) -> str | None:
        return None
