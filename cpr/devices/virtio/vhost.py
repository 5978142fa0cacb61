"""A network card's frames carried by the kernel, in the place of the card's own thread."""

from __future__ import annotations

import os

from cpr.devices.iommufd import passed_or_made
from cpr.errors import ConfigError
from cpr.uapi import vhost, virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.devices.virtio.native import Queue
    from cpr.memory import GuestMemory
    from cpr.state.fds import PreservedFds

NEEDED = virtio.F_VERSION_1 | virtio.F_EVENT_IDX | virtio.F_INDIRECT_DESC | virtio.NET_F_MRG_RXBUF
"""What the card offers its guest, and the kernel has to know."""


class VhostNet:
    """/dev/vhost-net for the tap `tap`.  Owns its descriptor, which is in `fds` as `name`.

    While it runs this process is its owner: not before, nor afterwards.
    """

    def __init__(self, fds: PreservedFds, name: str, passed: str | None) -> None:
        """Raises ConfigError."""
        self._fds = fds
        self._name = name
        self._running = 0
        self._fd = fds.open(name, 0, lambda: passed_or_made(passed, "vhostfd", vhost.open_vhost))
        try:
            if missing := NEEDED & ~vhost.features(self._fd):
                raise ConfigError(f"vhost of this kernel lacks features {missing:#x}")
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        self._fds.delete(self._name, 0)
        os.close(self._fd)

    def start(
        self,
        tap: int,
        has_header: bool,
        features: int,
        memory: GuestMemory,
        queues: Sequence[Queue],
    ) -> None:
        """Has the kernel work on the queues, the first from the tap and the second to it.

        `features` are what the guest has chosen.  Nothing happens where a queue is off.  Raises
        KernelError; then it does not run.
        """
        rings = []
        for queue in queues:
            places = queue.places()
            if places is None:
                return
            rings.append(
                vhost.Ring(queue.size, queue.next(), places, queue.kick, queue.call, queue.error)
            )
        regions = [
            (section.start, section.size, section.block.host + section.offset)
            for section in memory.sections
            if not section.readonly
        ]
        wanted = features & NEEDED | (0 if has_header else vhost.MAKES_HEADERS)
        vhost.take(self._fd, wanted, regions, rings, tap)
        self._running = len(rings)
        for queue in queues:  # what was offered before, without a notification from now on
            os.eventfd_write(queue.kick, 1)

    def stop(self, queues: Sequence[Queue]) -> None:
        """The inverse: the queues are where the kernel has come to.  Raises KernelError."""
        count, self._running = self._running, 0
        if count:
            for queue, following in zip(queues, vhost.give(self._fd, count), strict=True):
                queue.moved(following)

    def set_calls(self, queues: Sequence[Queue]) -> None:
        """The queues' interrupts may be other eventfds.  Raises KernelError."""
        for index in range(self._running):
            vhost.set_call(self._fd, index, queues[index].call)
