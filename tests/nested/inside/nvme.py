"""nvme driven from userspace through VFIO: the controller, and Identify on its admin queue."""

from __future__ import annotations

import mmap
import time

from cpr.uapi import vfio
from cpr.uapi.fd import Fd

from .edu import COMMAND, MEMORY_AND_MASTER, SECONDS

CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
ENABLED = 0x00460001
READY = 1
SLOTS = 4
SUBMISSIONS, COMPLETIONS, DATA = 0x100000, 0x101000, 0x102000
IDENTIFY, CONTROLLER = 6, 1
SERIAL = slice(DATA + 4, DATA + 24)


class Nvme:
    """The controller of an open VFIO device; `ram` is mapped for it from address 0 on."""

    def __init__(self, device: Fd, ram: mmap.mmap) -> None:
        self.device = device
        self.ram = ram
        self.words = memoryview(ram).cast("I")
        region = vfio.region_info(device, 0)
        bar = mmap.mmap(device.number, region.size, offset=region.offset)
        self.registers = memoryview(bar).cast("I")

    def enable_memory(self) -> None:
        config = vfio.region_info(self.device, vfio.CONFIG_REGION)
        value = vfio.read_region(self.device, config, COMMAND, 2) | MEMORY_AND_MASTER
        vfio.write_region(self.device, config, COMMAND, 2, value)

    def enable(self) -> None:
        self.enable_memory()
        self.ram[COMPLETIONS : COMPLETIONS + 4096] = bytes(4096)
        values = (AQA, (SLOTS - 1) * 0x10001), (ASQ, SUBMISSIONS), (ACQ, COMPLETIONS)
        self.registers[CC // 4] = 0
        self._wait(0)
        for register, value in values:
            self.registers[register // 4] = value
        self.registers[ASQ // 4 + 1] = self.registers[ACQ // 4 + 1] = 0
        self.registers[CC // 4] = ENABLED
        self._wait(READY)

    def _wait(self, ready: int) -> None:
        deadline = time.monotonic() + SECONDS
        while self.csts & READY != ready:
            assert time.monotonic() < deadline, f"CSTS stays {self.csts:#x}"

    @property
    def cc(self) -> int:
        return self.registers[CC // 4]

    @property
    def csts(self) -> int:
        return self.registers[CSTS // 4]

    def identify(self, slot: int) -> str:
        """Identify in this slot of the first round of the queues; the serial number that comes."""
        self.ram[SERIAL] = bytes(20)
        command = [slot << 16 | IDENTIFY] + [0] * 15
        command[6], command[10] = DATA, CONTROLLER
        first = (SUBMISSIONS + 64 * slot) // 4
        for i, word in enumerate(command):
            self.words[first + i] = word
        completion = (COMPLETIONS + 16 * slot) // 4 + 3
        self.registers[DOORBELLS // 4] = slot + 1
        deadline = time.monotonic() + SECONDS
        while not self.words[completion] >> 16 & 1:
            assert time.monotonic() < deadline, "no completion"
        assert self.words[completion] & 0xFFFF == slot
        assert self.words[completion] >> 17 == 0, "Identify failed"
        self.registers[DOORBELLS // 4 + 1] = slot + 1
        return self.ram[SERIAL].decode().strip()
