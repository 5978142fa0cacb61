"""Port I/O and memory-mapped I/O: from an address to the device that answers.

This is the Bus of every vCPU.  It takes the machine's lock, so device code runs one at a time.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    ReadHandler = Callable[[int, int], int]
    WriteHandler = Callable[[int, int, int], None]


class Region:
    """[base, base+length) belongs to a device; accesses over `access_size` bytes are split."""

    __slots__ = ("access_size", "base", "end", "name", "read", "write")

    def __init__(
        self,
        base: int,
        length: int,
        read: ReadHandler,
        write: WriteHandler,
        name: str,
        access_size: int,
    ) -> None:
        self.base = base
        self.end = base + length
        self.read = read
        self.write = write
        self.name = name
        self.access_size = access_size


class AddressSpace:
    """Regions that do not overlap.  Where there is none, reads give ones and writes vanish."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, region: Region) -> None:
        """Raises ValueError if an address of the region is taken."""
        for other in self.regions:
            if region.base < other.end and other.base < region.end:
                raise ValueError(f"{region.name} at {region.base:#x} overlaps {other.name}")
        self.regions.append(region)

    def remove(self, base: int, length: int) -> None:
        """The inverse of `add`."""
        self.regions = [r for r in self.regions if (r.base, r.end) != (base, base + length)]

    def find(self, address: int) -> Region | None:
        for region in self.regions:
            if region.base <= address < region.end:
                return region
        return None

    def read(self, address: int, size: int) -> int:
        value = 0
        done = 0
        while done < size:
            region = self.find(address + done)
            if region is None:
                piece, got = 1, 0xFF
            else:
                piece = self._piece(region, address + done, size - done)
                got = region.read(address + done - region.base, piece)
            value |= (got & (1 << 8 * piece) - 1) << 8 * done
            done += piece
        return value

    def write(self, address: int, size: int, value: int) -> None:
        done = 0
        while done < size:
            region = self.find(address + done)
            if region is None:
                piece = 1
            else:
                piece = self._piece(region, address + done, size - done)
                part = value >> 8 * done & (1 << 8 * piece) - 1
                region.write(address + done - region.base, piece, part)
            done += piece

    @staticmethod
    def _piece(region: Region, address: int, left: int) -> int:
        """The largest power of two that the region takes here at once."""
        piece = min(region.access_size, left, region.end - address)
        return 1 << piece.bit_length() - 1


class IOBus:
    """The Bus that vCPUs see: both address spaces under one lock."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.io = AddressSpace()
        self.memory = AddressSpace()

    def io_read(self, port: int, size: int) -> int:
        with self.lock:
            return self.io.read(port, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        with self.lock:
            self.io.write(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        with self.lock:
            return self.memory.read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        with self.lock:
            self.memory.write(address, size, value)
