"""edu driven from userspace through VFIO: registers, DMA, its interrupt."""

from __future__ import annotations

import mmap
import time

from cpr.uapi import vfio
from cpr.uapi.fd import Fd

BAR = 0
BUFFER = 0x40000
BYTES = 2048  # a DMA of 4096 ends QEMU 7.2
IRQ_STATUS, IRQ_RAISE, IRQ_ACKNOWLEDGE = 0x24, 0x60, 0x64
DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
RUN, FROM_DEVICE, WITH_INTERRUPT = 1, 2, 4
COMMAND = 4  # the PCI register
MEMORY_AND_MASTER = 0x6
OUTSIDE_INTERRUPT = 0x20  # a cause that edu's guest does not raise
SECONDS = 30.0


class Edu:
    """The device of an open VFIO device descriptor, which stays the caller's."""

    def __init__(self, device: Fd) -> None:
        self.device = device
        region = vfio.region_info(device, BAR)
        self._bar = mmap.mmap(device.number, region.size, offset=region.offset)
        self.registers = memoryview(self._bar).cast("I")
        self.config = vfio.region_info(device, vfio.CONFIG_REGION)

    def close(self) -> None:
        """Unmaps the registers."""
        self.registers.release()
        self._bar.close()

    def enable(self) -> None:
        """Memory and bus mastering on, as a guest's driver does it."""
        value = vfio.read_region(self.device, self.config, COMMAND, 2) | MEMORY_AND_MASTER
        vfio.write_region(self.device, self.config, COMMAND, 2, value)

    @property
    def command(self) -> int:
        """PCI_COMMAND as VFIO shows it to the user."""
        return vfio.read_region(self.device, self.config, COMMAND, 2)

    def read(self, register: int) -> int:
        return self.registers[register // 4]

    def write(self, register: int, value: int) -> None:
        self.registers[register // 4] = value

    def start_dma(self, source: int, destination: int, command: int) -> None:
        self.write(DMA_SOURCE, source)
        self.write(DMA_DESTINATION, destination)
        self.write(DMA_COUNT, BYTES)
        self.write(DMA_COMMAND, RUN | command)

    def wait_dma(self) -> None:
        deadline = time.monotonic() + SECONDS
        while self.read(DMA_COMMAND) & RUN:
            assert time.monotonic() < deadline, "the DMA does not end"
            time.sleep(0.005)

    def send(self, iova: int) -> None:
        """DMA out of memory at `iova` into the device's buffer."""
        self.start_dma(iova, BUFFER, 0)
        self.wait_dma()

    def fetch(self, iova: int) -> None:
        """DMA out of the device's buffer into memory at `iova`."""
        self.start_dma(BUFFER, iova, FROM_DEVICE)
        self.wait_dma()

    def copies(self, memory: mmap.mmap, iova: int, seed: int) -> bool:
        """Whether a pattern goes there and back right; `memory` is what `iova` maps from 0 on."""
        sent = bytes((seed * 7 + i * 13 + i // 256) & 0xFF for i in range(BYTES))
        memory[:BYTES] = sent
        memory[4096 : 4096 + BYTES] = bytes(BYTES)
        self.send(iova)
        self.fetch(iova + 4096)
        return memory[4096 : 4096 + BYTES] == sent

    def acknowledge(self) -> int:
        """Takes back the interrupt; returns what had raised it."""
        status = self.read(IRQ_STATUS)
        self.write(IRQ_ACKNOWLEDGE, status)
        return status
