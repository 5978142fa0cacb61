"""/dev/vhost-net: frames between a tap and virtqueues, carried by the kernel (linux/vhost.h).

Whoever has it is its owner: one process's memory, in which the rings and the guest's RAM are.  It
is had by `take` and given up by `give`, so that its descriptor goes over an exec, or to another
process, without an owner.
"""

from __future__ import annotations

import os

from cpr._native._cpr import ffi, lib
from cpr.errors import ConfigError, KernelError
from cpr.uapi.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

DEVICE = "/dev/vhost-net"
MAKES_HEADERS = 1 << lib.VHOST_NET_F_VIRTIO_NET_HDR  # for a tap whose frames have none of virtio's


class Ring:
    """One virtqueue as the kernel is told of it.

    `places` are the addresses of its descriptors, available and used ring in this process; `base`
    the index of the next chain to take; the others are eventfds, which stay the caller's.
    """

    def __init__(
        self, size: int, base: int, places: tuple[int, int, int], kick: int, call: int, error: int
    ) -> None:
        self.size = size
        self.base = base
        self.places = places
        self.kick = kick
        self.call = call
        self.error = error


def open_vhost() -> int:
    """A close-on-exec descriptor, which is the caller's.  Raises ConfigError."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"tap: open vhost char device failed: {error.strerror}\n"
            f"It is {DEVICE}, of the kernel's module vhost_net; without vhost=on the VMM carries "
            "the frames."
        ) from None


def features(fd: int) -> int:
    """What it can do, as virtio's features.  Raises ConfigError for what is no vhost device."""
    found = ffi.new("uint64_t *")
    try:
        Fd(fd, DEVICE).ioctl(lib.VHOST_GET_FEATURES, "VHOST_GET_FEATURES", found)
    except KernelError:
        raise ConfigError(f"vhostfd={fd} is not {DEVICE}") from None
    return int(found[0])


def take(
    fd: int, wanted: int, regions: Iterable[tuple[int, int, int]], rings: list[Ring], tap: int
) -> None:
    """Becomes the owner, and has the kernel work on `rings`: the first from `tap`, the next to it.

    `wanted` are virtio's features; `regions` the guest's RAM: address, size, address in this
    process.  Raises KernelError; then it is not the owner.
    """
    vhost = Fd(fd, DEVICE)
    vhost.ioctl(lib.VHOST_SET_OWNER, "VHOST_SET_OWNER")
    try:
        chosen = ffi.new("uint64_t *", wanted)
        vhost.ioctl(lib.VHOST_SET_FEATURES, "VHOST_SET_FEATURES", chosen)
        vhost.ioctl(lib.VHOST_SET_MEM_TABLE, "VHOST_SET_MEM_TABLE", _memory(list(regions)))
        for index, ring in enumerate(rings):
            _set_ring(vhost, index, ring)
        for index in range(len(rings)):
            _set_file(vhost, lib.VHOST_NET_SET_BACKEND, "VHOST_NET_SET_BACKEND", index, tap)
    except KernelError:
        vhost.ioctl(lib.VHOST_RESET_OWNER, "VHOST_RESET_OWNER")
        raise


def give(fd: int, count: int) -> list[int]:
    """The inverse; returns how far each of the `count` rings is: the next chain to take.

    No chain is under way when it returns.  Raises KernelError; it is not the owner then either.
    """
    vhost = Fd(fd, DEVICE)
    bases = []
    try:
        for index in range(count):
            _set_file(vhost, lib.VHOST_NET_SET_BACKEND, "VHOST_NET_SET_BACKEND", index, -1)
            state = ffi.new("struct vhost_vring_state *", {"index": index})
            vhost.ioctl(lib.VHOST_GET_VRING_BASE, "VHOST_GET_VRING_BASE", state)
            bases.append(int(state.num) & 0xFFFF)
    finally:
        vhost.ioctl(lib.VHOST_RESET_OWNER, "VHOST_RESET_OWNER")
    return bases


def set_call(fd: int, index: int, eventfd: int) -> None:
    """Has another eventfd, or none (-1), written for a ring's interrupts.  Raises KernelError."""
    _set_file(Fd(fd, DEVICE), lib.VHOST_SET_VRING_CALL, "VHOST_SET_VRING_CALL", index, eventfd)


def _memory(regions: list[tuple[int, int, int]]) -> ffi.CData:
    table = ffi.new("struct vhost_memory *", {"regions": len(regions)})
    table.nregions = len(regions)
    for place, (start, size, host) in zip(table.regions, regions, strict=True):
        place.guest_phys_addr, place.memory_size, place.userspace_addr = start, size, host
    return table


def _set_ring(vhost: Fd, index: int, ring: Ring) -> None:
    for request, name, number in (
        (lib.VHOST_SET_VRING_NUM, "VHOST_SET_VRING_NUM", ring.size),
        (lib.VHOST_SET_VRING_BASE, "VHOST_SET_VRING_BASE", ring.base),
    ):
        vhost.ioctl(request, name, ffi.new("struct vhost_vring_state *", (index, number)))
    addresses = ffi.new("struct vhost_vring_addr *", {"index": index})
    addresses.desc_user_addr, addresses.avail_user_addr, addresses.used_user_addr = ring.places
    vhost.ioctl(lib.VHOST_SET_VRING_ADDR, "VHOST_SET_VRING_ADDR", addresses)
    for request, name, fd in (
        (lib.VHOST_SET_VRING_KICK, "VHOST_SET_VRING_KICK", ring.kick),
        (lib.VHOST_SET_VRING_CALL, "VHOST_SET_VRING_CALL", ring.call),
        (lib.VHOST_SET_VRING_ERR, "VHOST_SET_VRING_ERR", ring.error),
    ):
        _set_file(vhost, request, name, index, fd)


def _set_file(vhost: Fd, request: int, name: str, index: int, fd: int) -> None:
    vhost.ioctl(request, name, ffi.new("struct vhost_vring_file *", (index, fd)))
