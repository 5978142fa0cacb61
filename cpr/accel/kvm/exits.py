"""Exits of a vCPU that a device serves."""

from __future__ import annotations

from cpr._native._cpr import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.accel.base import Bus


def serve(exit_: Any, bus: Bus) -> None:
    """Serves an access that a vCPU waits for: a struct cpr_exit or cpr_vm_exit of IO or MMIO."""
    size = exit_.size
    for i in range(exit_.count):
        data = ffi.buffer(exit_.data + i * size, size)
        if exit_.reason == lib.KVM_EXIT_IO and exit_.is_write:
            bus.io_write(exit_.port, size, int.from_bytes(data[:], "little"))
        elif exit_.reason == lib.KVM_EXIT_IO:
            data[:] = bus.io_read(exit_.port, size).to_bytes(size, "little")
        elif exit_.is_write:
            bus.mmio_write(exit_.address, size, int.from_bytes(data[:], "little"))
        else:
            data[:] = bus.mmio_read(exit_.address, size).to_bytes(size, "little")
