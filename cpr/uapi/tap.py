"""Taps: /dev/net/tun (Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import os

from cpr._native._cpr import ffi, lib
from cpr.errors import ConfigError, KernelError

DEVICE = "/dev/net/tun"
MOST_NAME = lib.CPR_TAP_NAME - 1


def open_tap(name: str) -> int:
    """A non-blocking, close-on-exec descriptor of the tap `name`, which is the caller's.

    An empty name makes a new one, as does one that there is not.  Raises ConfigError.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"could not open {DEVICE}: {error.strerror}") from None
    buffer = ffi.new("char[]", name.encode().ljust(lib.CPR_TAP_NAME, b"\0"))
    result = lib.cpr_tap_attach(fd, buffer)
    if result:
        os.close(fd)
        raise ConfigError(f"could not configure {DEVICE} ({name}): {os.strerror(-result)}")
    return fd


def query(fd: int) -> tuple[str, bool]:
    """The name of a tap, and whether its frames have virtio's header.

    Raises ConfigError for what is no tap.
    """
    name, has_header = ffi.new("char[]", lib.CPR_TAP_NAME), ffi.new("bool *")
    result = lib.cpr_tap_query(fd, name, has_header)
    if result == -errno.EBADFD:
        raise ConfigError(f"descriptor {fd} is not a tap")
    if result:
        raise ConfigError(f"descriptor {fd}: {os.strerror(-result)}")
    return ffi.string(name).decode(), bool(has_header[0])


def set_offload(fd: int, checksums: bool, tcp4: bool, tcp6: bool, ecn: bool, udp: bool) -> None:
    """Says what whoever reads the tap can take: frames whose checksum is not filled in, and
    segments that are larger than a frame.  Raises KernelError.
    """
    result = lib.cpr_tap_offload(fd, checksums, tcp4, tcp6, ecn, udp)
    if result == -errno.EINVAL and udp:  # some kernels have no segments for UDP
        result = lib.cpr_tap_offload(fd, checksums, tcp4, tcp6, ecn, False)
    if result:
        raise KernelError("TUNSETOFFLOAD", -result)
