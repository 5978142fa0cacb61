"""virtio-net-pci: a network card on a tap (virtio 1.2, 5.1)."""

from __future__ import annotations

import os

from cpr import report
from cpr._native._cpr import ffi, lib
from cpr.devices.iommufd import passed_or_made
from cpr.devices.virtio.device import VirtioDevice
from cpr.devices.virtio.pci import add_function
from cpr.devices.virtio.vhost import VhostNet
from cpr.errors import ConfigError, KernelError
from cpr.uapi import tap, virtio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config import DeviceConfig, NetdevConfig
    from cpr.devices.board import Board
    from cpr.devices.virtio.device import Transport
    from cpr.state.fds import PreservedFds

QUEUE_SIZE = 256
RECEIVE, TRANSMIT = 0, 1
NETWORK = 0x020000
MAC_SIZE = 6
STATUS_OFFSET, LINK_UP = 6, 1
FIRST_MAC = 0x525400123456  # QEMU's; the next card has the next one
MULTICAST = 1

OFFLOADS = (
    virtio.NET_F_CSUM
    | virtio.NET_F_GUEST_CSUM
    | virtio.NET_F_GUEST_TSO4
    | virtio.NET_F_GUEST_TSO6
    | virtio.NET_F_GUEST_ECN
    | virtio.NET_F_HOST_TSO4
    | virtio.NET_F_HOST_TSO6
    | virtio.NET_F_HOST_ECN
)
"""What a tap can only say in virtio's header."""


class VirtioNet(VirtioDevice):
    """The card on `netdev`, whose descriptors go over updates.  Owns them, and the thread in C,
    which has nothing to do where the kernel carries the frames.
    """

    name = "virtio-net"
    device_id = virtio.ID_NET
    pci_class = NETWORK
    kicks = True
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self, netdev: NetdevConfig, fds: PreservedFds, mac: bytes) -> None:
        self._netdev = netdev
        self._fds = fds
        self._fd_name = f"netdev:{netdev.id}"
        self._config = mac + LINK_UP.to_bytes(2, "little")
        self._guest_features = 0
        self._vhost: VhostNet | None = None
        self.features = virtio.NET_F_MAC | virtio.NET_F_STATUS | virtio.NET_F_MRG_RXBUF

    def open(self) -> None:
        """Opens the tap, by which the features are known.  Raises ConfigError."""
        netdev = self._netdev
        self._fd = self._fds.open(
            self._fd_name,
            0,
            lambda: passed_or_made(netdev.fd, "fd", lambda: tap.open_tap(netdev.ifname)),
        )
        try:
            _, self._has_header = tap.query(self._fd)
            os.set_blocking(self._fd, False)
            if self._netdev.vhost:
                self._vhost = VhostNet(self._fds, f"{self._fd_name}:vhost", self._netdev.vhostfd)
        except ConfigError:
            self._close()
            raise
        if self._has_header:
            self.features |= OFFLOADS

    def _close(self) -> None:
        if self._vhost is not None:
            self._vhost.close()
            self._vhost = None
        self._fds.delete(self._fd_name, 0)
        os.close(self._fd)

    def realize(self, transport: Transport) -> None:
        self.transport = transport
        if self._vhost is not None and transport.platform.accel.write_listener() is not None:
            self._close()
            raise ConfigError(
                f"netdev '{self._netdev.id}': vhost=on needs -accel kvm; leave it out, and the VMM "
                "carries the frames"
            )
        made = ffi.new("struct cpr_net **")
        receive, transmit = transport.queues
        error = lib.cpr_net_new(
            *(self._fd, self._has_header),
            *(receive.pointer, receive.kick, transmit.pointer, transmit.kick),
            made,
        )
        if error:
            self._close()
            raise KernelError(f"epoll on tap '{self._netdev.id}'", -error)
        self._net = made[0]

    def unrealize(self) -> None:
        lib.cpr_net_free(self._net)
        self._close()

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._config[offset : offset + size], "little")

    def set_features(self, features: int) -> None:
        self._guest_features = features

    def start(self) -> None:
        features = self._guest_features
        if self._has_header:
            tap.set_offload(
                self._fd,
                bool(features & virtio.NET_F_GUEST_CSUM),
                bool(features & virtio.NET_F_GUEST_TSO4),
                bool(features & virtio.NET_F_GUEST_TSO6),
                bool(features & virtio.NET_F_GUEST_ECN),
                False,
            )
        if self._vhost is not None:
            transport = self.transport
            memory, queues = transport.platform.memory, transport.queues
            self._vhost.start(self._fd, self._has_header, features, memory, queues)
            return
        error = lib.cpr_net_start(self._net, bool(features & virtio.NET_F_MRG_RXBUF))
        if error:
            raise KernelError("the thread of a network card", -error)

    def stop(self) -> None:
        if self._vhost is not None:
            try:
                self._vhost.stop(self.transport.queues)
            except KernelError as error:
                report.error_report(f"netdev '{self._netdev.id}': {error}")
        lib.cpr_net_stop(self._net)

    def on_notifiers(self) -> None:
        if self._vhost is not None:
            try:
                self._vhost.set_calls(self.transport.queues)
            except KernelError as error:
                report.error_report(f"netdev '{self._netdev.id}': {error}")

    @property
    def problem(self) -> str:
        return "" if self._vhost is None else "vhost has met a chain that is no frame's"

    def copy_blocker(self) -> str | None:
        if self._vhost is None:
            return None
        return f"x-cpr-ram-staging: netdev '{self._netdev.id}': no log tells what vhost writes"


def parse_mac(text: str) -> bytes:
    """xx:xx:xx:xx:xx:xx, of one card.  Raises ConfigError."""
    separator = "-" if "-" in text else ":"
    try:
        octets = bytes(int(part, 16) for part in text.split(separator) if len(part) == 2)
    except ValueError:
        octets = b""
    if len(octets) != MAC_SIZE or text.count(separator) != MAC_SIZE - 1:
        raise ConfigError(f"Property 'virtio-net-device.mac' doesn't take value '{text}'")
    if octets[0] & MULTICAST:
        raise ConfigError(f"mac={text} is an address of many cards: its first byte must be even")
    return octets


def create(board: Board, config: DeviceConfig) -> None:
    """Makes the card of -device virtio-net-pci.  Raises CprError."""
    properties = config.properties
    name = properties.get("netdev")
    if name is None:
        raise ConfigError("netdev property not set")
    netdev, number = board.take_netdev(name, "virtio-net-device")
    text = properties.get("mac")
    mac = (FIRST_MAC + number).to_bytes(MAC_SIZE, "big") if text is None else parse_mac(text)
    card = VirtioNet(netdev, board.fds, mac)
    card.open()
    add_function(board, card, properties)
