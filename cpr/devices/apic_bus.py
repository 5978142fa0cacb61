"""The bus between the local APICs, the I/O APIC and the PIC."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.devices.apic import LocalApic
    from cpr.devices.i8259 import I8259Pair

# Delivery modes of a message (Intel SDM vol. 3, 11.6.1).
FIXED, LOWEST_PRIORITY, SMI, REMOTE_READ, NMI, INIT, START_UP, EXTINT = range(8)

MESSAGE_ADDRESS = 0xFEE00000


class ApicBus:
    """Local APICs enter themselves in `apics`, in the order of their vCPUs.

    `pic` is the pair whose INT output is on LINT0 of every local APIC, or None.  `eoi_handlers`
    are called with the vector when a level-triggered interrupt has been ended.
    """

    def __init__(self, pic: I8259Pair | None = None) -> None:
        self.apics: list[LocalApic] = []
        self.eoi_handlers: list[Callable[[int], None]] = []
        self.pic = pic
        if pic is not None:
            pic.on_output = self._on_pic_output

    def deliver(
        self, destination: int, is_logical: bool, mode: int, vector: int, is_level: bool
    ) -> None:
        """Sends a message to the local APICs that it addresses."""
        self.send(self.addressed(destination, is_logical), mode, vector, is_level)

    def addressed(self, destination: int, is_logical: bool) -> list[LocalApic]:
        return [apic for apic in self.apics if apic.is_addressed(destination, is_logical)]

    def send(self, apics: list[LocalApic], mode: int, vector: int, is_level: bool) -> None:
        """Modes SMI, remote read and NMI are not there: such messages are dropped."""
        if mode == LOWEST_PRIORITY:
            apics = apics[:1]
        for apic in apics:
            if mode in (FIXED, LOWEST_PRIORITY, EXTINT):
                apic.request(vector, is_level)
            elif mode == INIT:
                apic.init()
            elif mode == START_UP:
                apic.start_up(vector)

    def signal_message(self, address: int, data: int) -> None:
        """Delivers a message-signalled interrupt (Intel SDM vol. 3, 11.11); elsewhere it is no one.

        In the address bits 19:12 are the destination, and bit 2 says that it is a logical one.
        """
        if address >> 20 == MESSAGE_ADDRESS >> 20:
            destination, is_logical = address >> 12 & 0xFF, bool(address & 4)
            self.deliver(destination, is_logical, data >> 8 & 7, data & 0xFF, bool(data >> 15 & 1))

    def acknowledge_pic(self) -> int:
        """Takes an interrupt out of the PIC and returns its vector."""
        return self.pic.acknowledge() if self.pic is not None else 0

    def end_of_interrupt(self, vector: int) -> None:
        for handler in self.eoi_handlers:
            handler(vector)

    def _on_pic_output(self, level: bool) -> None:
        for apic in self.apics:
            apic.set_lint0(level)
