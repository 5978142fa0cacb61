"""One VM whose vCPUs the library runs, and where the library is."""

from __future__ import annotations

import errno
import os
import sys

from cpr._native._tcg import ffi, lib
from cpr.accel import base
from cpr.accel.tcg.vcpu import LIBRARY, TcgVCpu, text
from cpr.errors import ConfigError, KernelError


class TcgAccelerator(base.Accelerator):
    """One VM without in-kernel devices."""

    name = "tcg"
    kernel_irqchip = False
    ioeventfds = True

    def __init__(self) -> None:
        """Raises ConfigError where the library is missing or is not one of unicorn 2.1."""
        path = _find_library()
        problem = lib.unicorn_load(os.fsencode(path))
        if problem != ffi.NULL:
            raise ConfigError(f"{path} cannot be used as the TCG accelerator: {text(problem)}")
        self._vm = lib.cpr_tcg_new()
        if self._vm == ffi.NULL:
            raise KernelError("calloc", errno.ENOMEM)

    def map_ram(self, address: int, size: int, host_address: int, readonly: bool = False) -> None:
        """Raises KernelError for a range that overlaps another or is not made of whole pages."""
        error = lib.cpr_tcg_map_ram(self._vm, address, size, host_address, readonly)
        if error:
            raise KernelError(
                f"mapping {size:#x} bytes of guest RAM at {address:#x}",
                -error,
                "TCG guests have at most 1 TiB of addresses: give this one less RAM with -m",
            )

    def unmap_ram(self, address: int, size: int) -> None:
        error = lib.cpr_tcg_unmap_ram(self._vm, address, size)
        if error:
            raise KernelError(f"unmapping {size:#x} bytes of guest RAM at {address:#x}", -error)

    def write_listener(self) -> tuple[int, int]:
        """The engines, which have translated code."""
        function = ffi.cast("uintptr_t", ffi.addressof(lib, "cpr_tcg_written"))
        return int(function), int(ffi.cast("uintptr_t", self._vm))

    def add_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
        error = lib.cpr_tcg_add_notify(self._vm, address, size, eventfd)
        if error:
            raise KernelError(f"an ioeventfd at {address:#x}", -error)

    def remove_ioeventfd(self, address: int, size: int, eventfd: int) -> None:
        lib.cpr_tcg_remove_notify(self._vm, address, size, eventfd)

    def create_vcpu(self, index: int) -> TcgVCpu:
        return TcgVCpu(self._vm, index)

    def start_time(self, now_ns: int, advance_ns: int = 0) -> None:
        lib.cpr_tcg_start_time(self._vm, now_ns - advance_ns)

    def stop_time(self, now_ns: int) -> None:
        lib.cpr_tcg_stop_time(self._vm, now_ns)

    def close(self) -> None:
        lib.cpr_tcg_free(self._vm)
        self._vm = ffi.NULL


def _find_library() -> str:
    """The path of the library in the installed package `unicorn`."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for folder in [*sys.path, f"{sys.prefix}/lib/{version}/site-packages"]:
        path = os.path.join(folder, LIBRARY)
        if os.path.exists(path):
            return path
    raise ConfigError(
        "the TCG accelerator needs the Python package unicorn, which is not installed; "
        "install it with: pip install 'cpr-vmm[tcg]'"
    )
