"""A guest for the tests of the TCG accelerator: RAM, a recording bus, and states to start in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator

import pytest

from cpr.accel import base, x86
from cpr.accel.tcg import TcgAccelerator, TcgVCpu
from cpr.errors import CprError

RAM_SIZE = 4 << 20
STOP_PORT = 0xF4  # a write here kicks the vCPU
REAL_CODE = 0x7C00
CODE = 0x10000  # of protected and long mode
HANDLERS = 0x11000  # of vector N: at HANDLERS + 16 * N
GDT, IDT, PAGE_TABLES, TSS = 0x1000, 0x2000, 0x3000, 0x1800
LEVEL_0_STACK, LEVEL_3_STACK, TABLE_STACK = 0xA000, 0x9000, 0xB000
ABSENT = 0x200000  # not mapped by the page tables
READ_ONLY = 0x1FF000

CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
USER_DATA_SELECTOR, USER_CODE_SELECTOR = 0x1B, 0x23
TSS_SELECTOR = 0x28

CODE_64, CODE_32, DATA = 0x00A09B00, 0x00C09B00, 0x00C09300
USER = 3 << x86.FLAG_DPL_SHIFT
BUSY_TSS_32 = 0x8B00

RFLAGS_IF = 0x200
CR0_WP = 1 << 16


def code(*lines: str) -> bytes:
    return b"".join(bytes.fromhex(line) for line in lines)


COUNTER = code(
    "31 c0",  # xor ax, ax
    "8e d8",  # mov ds, ax
    "66 ff 06 00 80",  # again: inc dword ptr [0x8000]
    "eb f9",  # jmp again
)
COUNTER_LONG = code(
    "48 ff 04 25 00 80 00 00",  # again: inc qword ptr [0x8000]
    "eb f6",  # jmp again
)
STOP = code(
    "e6 f4",  # out 0xf4, al
    "eb fe",  # jmp .
)


def require_tcg() -> None:
    """Skips the module that calls it where unicorn is missing."""
    try:
        TcgAccelerator().close()
    except CprError as error:
        pytest.skip(str(error), allow_module_level=True)


class Bus:
    """Records accesses.  Reads give the access's number, from 1 on, in every byte."""

    def __init__(self) -> None:
        self.accesses: list[tuple] = []
        self.on_stop: Callable[[], None] = lambda: None

    def io_read(self, port: int, size: int) -> int:
        return self._read("in", port, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        if port == STOP_PORT:
            self.on_stop()
        else:
            self.accesses.append(("out", port, size, value))

    def mmio_read(self, address: int, size: int) -> int:
        return self._read("read", address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.accesses.append(("write", address, size, value))

    def _read(self, kind: str, address: int, size: int) -> int:
        self.accesses.append((kind, address, size))
        return int.from_bytes(bytes([len(self.accesses)]) * size, "little")


class Source:
    """An InterruptSource with the vectors that are put into it."""

    def __init__(self) -> None:
        self.vectors: list[int] = []

    def pending(self) -> bool:
        return bool(self.vectors)

    def acknowledge(self) -> int:
        return self.vectors.pop(0)


class Guest:
    """A VM with `vcpus` vCPUs; `close` frees it."""

    def __init__(self, vcpus: int = 1, ram: mmap.mmap | None = None) -> None:
        self.ram = ram or mmap.mmap(-1, RAM_SIZE)
        self._ram_start = ctypes.c_char.from_buffer(self.ram)
        self.host_address = ctypes.addressof(self._ram_start)
        self.accel = TcgAccelerator()
        self.accel.map_ram(0, RAM_SIZE, self.host_address)
        self.vcpus: list[TcgVCpu] = [self.accel.create_vcpu(i) for i in range(vcpus)]
        self.buses = [Bus() for _ in self.vcpus]
        for vcpu, bus in zip(self.vcpus, self.buses, strict=True):
            bus.on_stop = vcpu.kick

    @property
    def vcpu(self) -> TcgVCpu:
        return self.vcpus[0]

    @property
    def bus(self) -> Bus:
        return self.buses[0]

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.accel.close()
        del self._ram_start

    def write(self, address: int, data: bytes) -> None:
        self.ram[address : address + len(data)] = data

    def read(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.ram[address : address + size], "little")

    def set_vector(self, vector: int, offset: int) -> None:
        """An entry of the real-mode vector table, in segment 0."""
        self.write(4 * vector, offset.to_bytes(4, "little"))

    def start_real(self, program: bytes, rflags: int = 2, index: int = 0) -> None:
        """Makes the vCPU start at 0:REAL_CODE with its stack below."""
        self.write(REAL_CODE, program)
        self.vcpus[index].set_state(real_mode_state(index) | {"env.eflags": rflags})

    def start_long(self, program: bytes, level: int = 0, rflags: int = 2, index: int = 0) -> None:
        """Makes the vCPU start at CODE in 64-bit mode, with the tables below set up."""
        self.write(CODE, program)
        self._write_gdt(CODE_64)
        self._write_page_tables()
        tss = bytearray(0x68)
        tss[4:12] = LEVEL_0_STACK.to_bytes(8, "little")
        tss[0x24:0x2C] = TABLE_STACK.to_bytes(8, "little")
        self.write(TSS, bytes(tss))
        state = protected_state(CODE_64, level, index)
        state["env.cr"] = [0x80000001 | CR0_WP, 0, 0, PAGE_TABLES, x86.CR4_PAE | 0x600]
        state["env.efer"] = x86.EFER_LME | x86.EFER_LMA | 1
        state["env.eflags"] = rflags
        self.vcpus[index].set_state(state)

    def start_32(self, program: bytes, level: int = 0, rflags: int = 2) -> None:
        """Makes the vCPU start at CODE in flat 32-bit protected mode without paging."""
        self.write(CODE, program)
        self._write_gdt(CODE_32)
        tss = LEVEL_0_STACK.to_bytes(8, "little")[4:] + LEVEL_0_STACK.to_bytes(4, "little")
        self.write(TSS, (tss + DATA_SELECTOR.to_bytes(4, "little")).ljust(0x68, b"\0"))
        self.vcpu.set_state(protected_state(CODE_32, level, 0) | {"env.eflags": rflags})

    def set_gate(self, vector: int, handler: bytes, kind: int = 0x8E, table: int = 0) -> None:
        """A 64-bit gate to `handler`, which is put at its place.  `kind` is P, DPL and type."""
        offset = self._put_handler(vector, handler)
        low = offset & 0xFFFF | CODE_SELECTOR << 16 | table << 32 | kind << 40 | offset >> 16 << 48
        self.write(IDT + 16 * vector, low.to_bytes(8, "little") + bytes(8))

    def set_gate_32(self, vector: int, handler: bytes, kind: int = 0x8E) -> None:
        offset = self._put_handler(vector, handler)
        gate = offset & 0xFFFF | CODE_SELECTOR << 16 | kind << 40 | offset >> 16 << 48
        self.write(IDT + 8 * vector, gate.to_bytes(8, "little"))

    def _put_handler(self, vector: int, handler: bytes) -> int:
        self.write(HANDLERS + 16 * vector, handler)
        return HANDLERS + 16 * vector

    def _write_gdt(self, code_flags: int) -> None:
        descriptors = [0] + [
            flat_descriptor(flags) for flags in (code_flags, DATA, DATA | USER, code_flags | USER)
        ]
        tss = 0x67 | TSS << 16 | BUSY_TSS_32 << 32
        descriptors += [tss, 0]
        self.write(GDT, b"".join(value.to_bytes(8, "little") for value in descriptors))

    def _write_page_tables(self) -> None:
        """Maps the first 2 MiB one to one, for user code too; the last page is read-only."""
        for level in range(3):
            table = PAGE_TABLES + 0x1000 * level
            self.write(table, (table + 0x1000 | 7).to_bytes(8, "little"))
        last = PAGE_TABLES + 0x3000
        for page in range(512):
            access = 5 if page << 12 == READ_ONLY else 7
            self.write(last + 8 * page, (page << 12 | access).to_bytes(8, "little"))

    @contextlib.contextmanager
    def running(self, *indices: int) -> Iterator[None]:
        """Runs the vCPUs (all, by default) on threads of their own; kicks them in the end."""
        chosen = indices or range(len(self.vcpus))
        results: list[str] = []

        def run(index: int) -> None:
            results.append(self.vcpus[index].run(self.buses[index]))

        threads = [threading.Thread(target=run, args=(index,)) for index in chosen]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for index in chosen:
                self.vcpus[index].kick()
            for thread in threads:
                thread.join()
        assert results == [base.KICKED] * len(threads)

    def run(self) -> str:
        return self.vcpu.run(self.bus)


def flat_descriptor(flags: int) -> int:
    return 0xFFFF | 0xF << 48 | flags << 32


def real_mode_state(index: int) -> dict:
    state = x86.reset_state(index)
    state["env.segs"][x86.CS] = x86.segment(0, 0, 0xFFFF, 0x9B00)
    state["env.idt"]["limit"] = 0x3FF
    state["env.eip"] = REAL_CODE
    state["env.regs"][x86.RSP] = 0x7000
    state["env.mp_state"] = x86.MP_RUNNABLE
    return state


def protected_state(code_flags: int, level: int, index: int) -> dict:
    state = x86.reset_state(index)
    user = USER if level else 0
    data = x86.segment(USER_DATA_SELECTOR if level else DATA_SELECTOR, 0, 0xFFFFFFFF, DATA | user)
    selector = USER_CODE_SELECTOR if level else CODE_SELECTOR
    state["env.segs"] = [dict(data) for _ in range(6)]
    state["env.segs"][x86.CS] = x86.segment(selector, 0, 0xFFFFFFFF, code_flags | user)
    state["env.tr"] = x86.segment(TSS_SELECTOR, TSS, 0x67, BUSY_TSS_32)
    state["env.gdt"] = x86.segment(0, GDT, 0x37)
    state["env.idt"] = x86.segment(0, IDT, 0xFFF)
    state["env.cr"] = [1, 0, 0, 0, 0x600]
    state["env.eip"] = CODE
    state["env.regs"][x86.RSP] = LEVEL_3_STACK if level else LEVEL_0_STACK
    state["env.mp_state"] = x86.MP_RUNNABLE
    return state
