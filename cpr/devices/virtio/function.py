"""The configuration space of a virtio function, and where its registers are in BARs.

    BAR 1  the MSI-X table, and the pending bits at 0x800
    BAR 4  0x0000 common configuration, 0x1000 ISR, 0x2000 the device's own, 0x3000 notifications

These are where QEMU has them.
"""

from __future__ import annotations

from cpr.devices import pci_config
from cpr.devices.pci_config import BAR_MEMORY_64, BAR_PREFETCH, Bar, ConfigSpace
from cpr.devices.pci_msi import MsixCapability
from cpr.uapi import virtio

VENDOR, SUBSYSTEM = 0x1AF4, 0x1100
FIRST_DEVICE = 0x1040
REVISION = 1
CONFIG_SIZE = 256
INTA = 1
COMMAND_WRITABLE = pci_config.COMMAND_GUESTS | pci_config.COMMAND_PARITY | pci_config.COMMAND_SERR

MSIX_BAR, MSIX_BAR_SIZE, PBA_OFFSET = 1, 0x1000, 0x800
REGISTER_BAR, REGISTER_BAR_SIZE = 4, 0x4000
COMMON, ISR, OWN, NOTIFY, PART_SIZE = 0x0000, 0x1000, 0x2000, 0x3000, 0x1000
NOTIFY_MULTIPLIER = 4
NOTIFY_SIZE = 2  # a notification is a queue's number, in 16 bits
MOST_VECTORS = PBA_OFFSET // 16

# The capabilities: offset, kind, place in BAR 4, size.
CAPABILITIES = (
    (0x40, virtio.CAP_COMMON, COMMON, 16),
    (0x50, virtio.CAP_ISR, ISR, 16),
    (0x60, virtio.CAP_DEVICE, OWN, 16),
    (0x70, virtio.CAP_NOTIFY, NOTIFY, 20),
    (0x84, virtio.CAP_PCI, 0, 20),
)
MSIX_CAPABILITY = 0x98
CAP_VENDOR = 0x09
WINDOW = 0x84  # of CAP_PCI: bar at 4, offset at 8, length at 12, data at 16
WINDOW_DATA = WINDOW + 16


class Function:
    """Configuration space of a device with virtio's `device_id`, the class code `pci_class` and so
    many MSI-X vectors, all of it emulated.
    """

    def __init__(self, device_id: int, pci_class: int, vectors: int) -> None:
        self.config = config = ConfigSpace(CONFIG_SIZE)
        self.msix = MsixCapability(
            config, MSIX_CAPABILITY, vectors - 1, MSIX_BAR, PBA_OFFSET | MSIX_BAR
        )
        _put(config, 0x00, 4, FIRST_DEVICE + device_id << 16 | VENDOR)
        _put(config, pci_config.STATUS, 2, pci_config.STATUS_CAPABILITIES)
        _put(config, 0x08, 4, pci_class << 8 | REVISION)
        _put(config, 0x2C, 4, SUBSYSTEM << 16 | VENDOR)
        _put(config, pci_config.CAPABILITIES, 1, CAPABILITIES[0][0])
        _put(config, pci_config.INTERRUPT_PIN, 1, INTA)
        config.emulate(pci_config.COMMAND, 2, 0, 0xFFFF, COMMAND_WRITABLE)
        config.emulate(pci_config.INTERRUPT_LINE, 1, 0, 0xFF, 0xFF)
        self._chain_capabilities()
        _put(config, MSIX_CAPABILITY, 2, pci_config.CAP_MSIX)
        _put(config, MSIX_CAPABILITY + 2, 2, vectors - 1)
        _put(config, MSIX_CAPABILITY + 4, 4, MSIX_BAR)
        _put(config, MSIX_CAPABILITY + 8, 4, PBA_OFFSET | MSIX_BAR)
        self.msix_bar = Bar(MSIX_BAR, MSIX_BAR_SIZE, 0)
        self.register_bar = Bar(REGISTER_BAR, REGISTER_BAR_SIZE, BAR_MEMORY_64 | BAR_PREFETCH)
        self.msix_bar.emulate(config)
        self.register_bar.emulate(config)

    def _chain_capabilities(self) -> None:
        """Virtio's own, one after the other, and MSI-X after the last."""
        config = self.config
        following = [each[0] for each in CAPABILITIES[1:]] + [MSIX_CAPABILITY]
        for (offset, kind, place, size), after in zip(CAPABILITIES, following, strict=True):
            _put(config, offset, 4, kind << 24 | size << 16 | after << 8 | CAP_VENDOR)
            if kind == virtio.CAP_PCI:
                config.emulate(offset + 4, 1, 0, 0xFF, 0xFF)
                config.emulate(offset + 8, 8, 0, (1 << 64) - 1, (1 << 64) - 1)
                continue
            _put(config, offset + 4, 1, REGISTER_BAR)
            _put(config, offset + 8, 4, place)
            _put(config, offset + 12, 4, PART_SIZE)
            if kind == virtio.CAP_NOTIFY:
                _put(config, offset + 16, 4, NOTIFY_MULTIPLIER)

    def reset(self, irq: int) -> None:
        """As at power-on, with `irq` in the register by which a driver finds INTx's."""
        self.config.write(0, CONFIG_SIZE, 0)
        self.config.write(pci_config.INTERRUPT_LINE, 1, irq)
        self.msix.reset()


def _put(config: ConfigSpace, offset: int, size: int, value: int) -> None:
    """A value that the guest only reads; bits that it can change stay so."""
    config.data[offset : offset + size] = value.to_bytes(size, "little")
