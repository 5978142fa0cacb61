"""The TCG accelerator: guest code, I/O, interrupts, state, several vCPUs."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tcg_guest import (
    ABSENT,
    CODE,
    CODE_SELECTOR,
    DATA_SELECTOR,
    GDT,
    HANDLERS,
    LEVEL_0_STACK,
    LEVEL_3_STACK,
    PAGE_TABLES,
    RAM_SIZE,
    READ_ONLY,
    REAL_CODE,
    RFLAGS_IF,
    TABLE_STACK,
    USER_CODE_SELECTOR,
    USER_DATA_SELECTOR,
    Guest,
    Source,
    code,
    real_mode_state,
)
from waiting import wait_for, wait_for_change

from cpr.accel import base, tcg, x86
from cpr.errors import ConfigError, CprError, KernelError

try:
    tcg.TcgAccelerator().close()
except CprError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.tcg

COUNTER = code(
    "31 c0",  # xor ax, ax
    "8e d8",  # mov ds, ax
    "66 ff 06 00 80",  # again: inc dword ptr [0x8000]
    "eb f9",  # jmp again
)
STOP = code(
    "e6 f4",  # out 0xf4, al
    "eb fe",  # jmp .
)
HALT_COUNTER = code(
    "fb",  # again: sti
    "f4",  # hlt
    "ff 06 00 80",  # inc word ptr [0x8000]
    "eb f8",  # jmp again
)
COUNT_INTERRUPT = code(
    "ff 06 10 80",  # inc word ptr [0x8010]
    "cf",  # iret
)
COUNTER_LONG = code(
    "48 ff 04 25 00 80 00 00",  # again: inc qword ptr [0x8000]
    "eb f6",  # jmp again
)
COUNT_INTERRUPT_LONG = code(
    "48 ff 04 25 10 80 00 00",  # inc qword ptr [0x8010]
    "48 cf",  # iretq
)
SHARED_COUNTER_LONG = code(
    "f0 48 ff 04 25 00 80 00 00",  # again: lock inc qword ptr [0x8000]
    "48 ff 03",  # inc qword ptr [rbx]
    "eb f2",  # jmp again
)
FLOATING = code(
    "db e3",  # fninit
    "d9 e8",  # fld1
    "d9 ee",  # fldz
    "f2 0f 10 0c 25 20 80 00 00",  # movsd xmm1, [0x8020]
    "b9 40 42 0f 00",  # mov ecx, 1000000
    "d9 e8",  # again: fld1
    "de c2",  # faddp st(2), st
    "d8 c1",  # fadd st, st(1)
    "f2 0f 58 c1",  # addsd xmm0, xmm1
    "f2 0f 59 04 25 28 80 00 00",  # mulsd xmm0, [0x8028]
    "48 6b d2 1f",  # imul rdx, rdx, 31
    "48 01 ca",  # add rdx, rcx
    "ff c9",  # dec ecx
    "75 e2",  # jnz again
    "df 3c 25 00 80 00 00",  # fistp qword ptr [0x8000]
    "df 3c 25 08 80 00 00",  # fistp qword ptr [0x8008]
    "f2 0f 11 04 25 10 80 00 00",  # movsd [0x8010], xmm0
    "48 89 14 25 18 80 00 00",  # mov [0x8018], rdx
    "e6 f4",  # out 0xf4, al
    "f4",  # hlt
)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def pair() -> Iterator[Guest]:
    guest = Guest(vcpus=2)
    yield guest
    guest.close()


def test_runs_real_mode_until_kicked(guest: Guest) -> None:
    guest.start_real(COUNTER)
    with guest.running():
        wait_for(lambda: guest.read(0x8000, 4) > 1000, "the counter")
    state = guest.vcpu.get_state()
    assert REAL_CODE <= state["env.eip"] < REAL_CODE + len(COUNTER)
    count = guest.read(0x8000, 4)
    with guest.running():
        wait_for(lambda: guest.read(0x8000, 4) > count, "the counter, again")


def test_kick_before_run_is_kept_once(guest: Guest) -> None:
    guest.start_real(COUNTER)
    guest.vcpu.kick()
    assert guest.run() == base.KICKED
    assert guest.read(0x8000, 4) == 0
    with guest.running():
        wait_for(lambda: guest.read(0x8000, 4) > 0, "the counter")


def test_every_stop_is_between_instructions(guest: Guest) -> None:
    """EAX, the doubleword in memory and EBX are stepped one after the other."""
    guest.start_real(
        code(
            "66 40",  # again: inc eax
            "66 a3 00 80",  # mov [0x8000], eax
            "eb 00",  # jmp next
            "66 43",  # next: inc ebx
            "eb f4",  # jmp again
        )
    )
    for _ in range(300):
        with guest.running():
            pass
        state = guest.vcpu.get_state()
        eax, ebx = state["env.regs"][x86.RAX], state["env.regs"][x86.RBX]
        assert eax == guest.read(0x8000, 4)
        assert eax - ebx == (state["env.eip"] == REAL_CODE + 8)


def test_ports(guest: Guest) -> None:
    guest.write(0x7D00, b"hello")
    guest.start_real(
        code(
            "ba f8 03",  # mov dx, 0x3f8
            "ec",  # in al, dx
            "a2 00 80",  # mov [0x8000], al
            "ed",  # in ax, dx
            "a3 04 80",  # mov [0x8004], ax
            "66 ed",  # in eax, dx
            "66 a3 08 80",  # mov [0x8008], eax
            "e4 60",  # in al, 0x60
            "b0 11",  # mov al, 0x11
            "ee",  # out dx, al
            "b8 22 22",  # mov ax, 0x2222
            "ef",  # out dx, ax
            "66 b8 33 33 33 33",  # mov eax, 0x33333333
            "66 ef",  # out dx, eax
            "be 00 7d",  # mov si, 0x7d00
            "b9 05 00",  # mov cx, 5
            "fc",  # cld
            "f3 6e",  # rep outsb
            "e6 f4",  # out 0xf4, al
        )
    )
    assert guest.run() == base.KICKED
    assert guest.bus.accesses == [
        ("in", 0x3F8, 1),
        ("in", 0x3F8, 2),
        ("in", 0x3F8, 4),
        ("in", 0x60, 1),
        ("out", 0x3F8, 1, 0x11),
        ("out", 0x3F8, 2, 0x2222),
        ("out", 0x3F8, 4, 0x33333333),
        *[("out", 0x3F8, 1, byte) for byte in b"hello"],
    ]
    assert [guest.read(0x8000 + i, 4) for i in (0, 4, 8)] == [0x01, 0x0202, 0x03030303]


def test_memory_without_ram_is_the_bus(guest: Guest) -> None:
    guest.start_long(
        code(
            "bb 00 00 e0 fe",  # mov ebx, 0xfee00000
            "67 8a 03",  # mov al, [ebx]
            "66 8b 4b 02",  # mov cx, [rbx + 2]
            "8b 53 04",  # mov edx, [rbx + 4]
            "88 43 20",  # mov [rbx + 0x20], al
            "66 89 4b 22",  # mov [rbx + 0x22], cx
            "89 53 24",  # mov [rbx + 0x24], edx
            "48 89 53 28",  # mov [rbx + 0x28], rdx
            "e6 f4",  # out 0xf4, al
        )
    )
    # The page directory's entry for 0xfee00000, a 2 MiB page.
    guest.write(PAGE_TABLES + 0x1000 + 3 * 8, (PAGE_TABLES + 0x2000 | 7).to_bytes(8, "little"))
    guest.write(PAGE_TABLES + 0x2000 + 0x1F7 * 8, (0xFEE00083).to_bytes(8, "little"))
    assert guest.run() == base.KICKED
    assert guest.bus.accesses[:6] == [
        ("read", 0xFEE00000, 1),
        ("read", 0xFEE00002, 2),
        ("read", 0xFEE00004, 4),
        ("write", 0xFEE00020, 1, 0x01),
        ("write", 0xFEE00022, 2, 0x0202),
        ("write", 0xFEE00024, 4, 0x03030303),
    ]
    assert sum(access[2] for access in guest.bus.accesses[6:]) == 8


def test_an_error_on_the_bus_ends_run(guest: Guest) -> None:
    def fail() -> None:
        raise ValueError("broken device")

    guest.start_real(STOP)
    guest.bus.on_stop = fail
    with pytest.raises(ValueError, match="broken device"):
        guest.run()


def test_rom_executes_and_does_not_change(guest: Guest) -> None:
    rom = code(
        "b8 21 43",  # mov ax, 0x4321
        "2e c7 06 10 00 66 66",  # mov word ptr cs:[0x10], 0x6666
        "cb",  # retf
    )
    address = 0xF0000
    guest.accel.unmap_ram(0, RAM_SIZE)
    guest.accel.map_ram(0, address, guest.host_address)
    guest.accel.map_ram(address, 0x10000, guest.host_address + address, readonly=True)
    guest.accel.map_ram(0xFFFF0000, 0x10000, guest.host_address + address, readonly=True)
    guest.write(address, rom)
    guest.start_real(
        code(
            "b8 00 f0",  # mov ax, 0xf000
            "8e d8",  # mov ds, ax
            "c7 06 10 00 55 55",  # mov word ptr [0x10], 0x5555
            "31 db",  # xor bx, bx
            "8e db",  # mov ds, bx
            "9a 00 00 00 f0",  # call 0xf000:0
            "a3 00 80",  # mov [0x8000], ax
            "e6 f4",  # out 0xf4, al
        )
    )
    assert guest.run() == base.KICKED
    assert guest.read(0x8000, 2) == 0x4321
    assert guest.read(address + 0x10, 2) == 0


def test_reset_vector_in_rom(guest: Guest) -> None:
    guest.accel.map_ram(0xFFFF0000, 0x10000, guest.host_address + 0xF0000, readonly=True)
    guest.write(0xFFFF0, code("ea 00 7c 00 00"))  # jmp 0:0x7c00
    guest.write(REAL_CODE, STOP)
    guest.vcpu.set_state(x86.reset_state(0))
    assert guest.run() == base.KICKED
    assert guest.vcpu.get_state()["env.eip"] == REAL_CODE + 2


def test_code_outside_ram_is_fetched_from_the_bus(guest: Guest) -> None:
    """Floating bus lines, 0xff, are no instruction: vector 6."""
    guest.bus.mmio_read = lambda address, size: (1 << 8 * size) - 1  # type: ignore[method-assign]
    guest.set_vector(6, 0x7E00)
    guest.write(0x7E00, STOP)
    guest.start_real(code("ea 00 00 00 a0"))  # jmp 0xa000:0
    guest.accel.unmap_ram(0, RAM_SIZE)
    guest.accel.map_ram(0, 0xA0000, guest.host_address)
    assert guest.run() == base.KICKED
    assert guest.vcpu.get_state()["env.eip"] == 0x7E02


def test_bad_ram_ranges_are_refused(guest: Guest) -> None:
    for address, size in ((RAM_SIZE - 0x1000, 0x2000), (RAM_SIZE, 0x800), (1 << 40, 0x1000)):
        with pytest.raises(KernelError, match=r"mapping .* of guest RAM"):
            guest.accel.map_ram(address, size, guest.host_address)
    with pytest.raises(KernelError, match="unmapping"):
        guest.accel.unmap_ram(0, 0x1000)


def test_from_real_to_long_mode(guest: Guest) -> None:
    guest.start_long(b"")  # for the tables
    guest.write(0x7CF0, (0x37).to_bytes(2, "little") + GDT.to_bytes(4, "little"))
    guest.start_real(
        code(
            "fa",  # cli
            "31 c0",  # xor ax, ax
            "8e d8",  # mov ds, ax
            "0f 01 16 f0 7c",  # lgdt [0x7cf0]
            "0f 20 e0",  # mov eax, cr4
            "0c 20",  # or al, 0x20
            "0f 22 e0",  # mov cr4, eax
            "66 b8 00 30 00 00",  # mov eax, 0x3000
            "0f 22 d8",  # mov cr3, eax
            "66 b9 80 00 00 c0",  # mov ecx, 0xc0000080
            "0f 32",  # rdmsr
            "80 cc 01",  # or ah, 1
            "0f 30",  # wrmsr
            "0f 20 c0",  # mov eax, cr0
            "66 0d 01 00 00 80",  # or eax, 0x80000001
            "0f 22 c0",  # mov cr0, eax
            "ea 39 7c 08 00",  # jmp 8:long
            "48 b8 88 77 66 55 44 33 22 11",  # long: mov rax, 0x1122334455667788
            "48 89 04 25 00 80 00 00",  # mov [0x8000], rax
            "e6 f4",  # out 0xf4, al
            "eb fe",  # jmp .
        )
    )
    assert guest.run() == base.KICKED
    assert guest.read(0x8000) == 0x1122334455667788
    state = guest.vcpu.get_state()
    assert state["env.efer"] & x86.EFER_LMA
    assert state["env.cr"][0] & x86.CR0_PG
    assert state["env.cr"][3] == PAGE_TABLES
    assert state["env.gdt"] == x86.segment(0, GDT, 0x37)
    cs = state["env.segs"][x86.CS]
    assert (cs["selector"], cs["base"], cs["limit"]) == (CODE_SELECTOR, 0, 0xFFFFFFFF)
    assert cs["flags"] & (x86.FLAG_L | x86.FLAG_P) == x86.FLAG_L | x86.FLAG_P


def test_interrupt_in_real_mode(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    guest.set_vector(0x21, 0x7E00)
    guest.write(0x7E00, COUNT_INTERRUPT)
    guest.start_real(COUNTER, rflags=RFLAGS_IF | 2)
    with guest.running():
        for n in range(1, 20):
            source.vectors.append(0x21)
            guest.vcpu.interrupt()
            wait_for(lambda n=n: guest.read(0x8010, 2) == n, "the handler")  # type: ignore[misc]
        wait_for_change(lambda: guest.read(0x8000, 4), "the counter")


def test_interrupts_that_come_together_are_all_delivered(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    for vector in (0x21, 0x22, 0x23):
        guest.set_vector(vector, 0x7E00)
    guest.write(0x7E00, COUNT_INTERRUPT)
    guest.start_real(COUNTER, rflags=RFLAGS_IF | 2)
    source.vectors = [0x21, 0x22, 0x23]
    with guest.running():
        guest.vcpu.interrupt()
        wait_for(lambda: guest.read(0x8010, 2) == 3, "the handler")


def test_interrupts_wait_for_if(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    source.vectors.append(0x21)
    guest.start_real(COUNTER)
    with guest.running():
        guest.vcpu.interrupt()
        wait_for(lambda: guest.read(0x8000, 4) > 1000, "the counter")
    assert source.vectors == [0x21]


def test_interrupt_shadow_of_sti(guest: Guest) -> None:
    """Interrupts are enabled only between NOP and CLI."""
    source = guest.vcpu.interrupt_source = Source()
    guest.set_vector(0x21, 0x7E00)
    guest.write(0x7E00, STOP)
    guest.start_real(
        code(
            "66 ff 06 00 80",  # again: inc dword ptr [0x8000]
            "fb",  # sti
            "90",  # nop
            "fa",  # cli
            "eb f6",  # jmp again
        )
    )
    source.vectors.append(0x21)
    guest.vcpu.interrupt()
    assert guest.run() == base.KICKED
    sp = guest.vcpu.get_state()["env.regs"][x86.RSP]
    assert sp == 0x7000 - 6
    assert guest.read(sp, 2) == REAL_CODE + 7  # the CLI


def test_halt_waits_for_an_interrupt(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    guest.set_vector(0x21, 0x7E00)
    guest.write(0x7E00, COUNT_INTERRUPT)
    guest.start_real(HALT_COUNTER)
    with guest.running():
        for n in range(1, 20):
            source.vectors.append(0x21)
            guest.vcpu.interrupt()
            wait_for(lambda n=n: guest.read(0x8000, 2) == n, "the wake-up")  # type: ignore[misc]
    assert guest.read(0x8010, 2) == 19


def test_kick_leaves_a_halted_vcpu_halted(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    guest.set_vector(0x21, 0x7E00)
    guest.write(0x7E00, COUNT_INTERRUPT)
    guest.start_real(HALT_COUNTER)
    state = guest.vcpu.get_state()
    while state["env.mp_state"] != x86.MP_HALTED:
        with guest.running():
            pass
        state = guest.vcpu.get_state()
    assert state["env.eip"] == REAL_CODE + 2
    guest.vcpu.set_state(state)
    with guest.running():
        source.vectors.append(0x21)
        guest.vcpu.interrupt()
        wait_for(lambda: guest.read(0x8000, 2) == 1, "the wake-up")


def test_halt_with_interrupts_off_ends_only_by_a_kick(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    guest.start_real(code("f4", "ff 06 00 80"))  # hlt; inc word ptr [0x8000]
    with guest.running():
        source.vectors.append(0x21)
        guest.vcpu.interrupt()
    assert source.vectors == [0x21]
    assert guest.read(0x8000, 2) == 0


def test_software_interrupt_in_real_mode(guest: Guest) -> None:
    guest.set_vector(0x21, 0x7E00)
    guest.write(0x7E00, code("9c", "8f 06 10 80", "cf"))  # pushf; pop word ptr [0x8010]; iret
    guest.start_real(
        code(
            "fb",  # sti
            "cd 21",  # int 0x21
            "c7 06 00 80 34 12",  # mov word ptr [0x8000], 0x1234
            "e6 f4",  # out 0xf4, al
        )
    )
    assert guest.run() == base.KICKED
    assert guest.read(0x8000, 2) == 0x1234
    assert guest.read(0x7000 - 6, 2) == REAL_CODE + 3
    assert guest.read(0x7000 - 2, 2) & RFLAGS_IF
    assert guest.read(0x8010, 2) & RFLAGS_IF == 0


def test_division_by_zero_in_real_mode(guest: Guest) -> None:
    guest.set_vector(0, 0x7E00)
    guest.write(0x7E00, STOP)
    guest.start_real(code("31 db", "f7 f3"))  # xor bx, bx; div bx
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    assert state["env.eip"] == 0x7E02
    assert guest.read(state["env.regs"][x86.RSP], 2) == REAL_CODE + 2


def test_interrupt_in_long_mode(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    guest.start_long(COUNTER_LONG, rflags=RFLAGS_IF | 2)
    guest.set_gate(0x50, COUNT_INTERRUPT_LONG)
    with guest.running():
        for n in range(1, 20):
            source.vectors.append(0x50)
            guest.vcpu.interrupt()
            wait_for(lambda n=n: guest.read(0x8010) == n, "the handler")  # type: ignore[misc]
        wait_for_change(lambda: guest.read(0x8000), "the counter")
    assert guest.vcpu.get_state()["env.regs"][x86.RSP] in range(
        LEVEL_0_STACK - 48, LEVEL_0_STACK + 1
    )


@pytest.mark.parametrize(
    ("program", "vector", "error_code", "cr2"),
    [
        ("48 8b 04 25 08 00 20 00", 14, 0, ABSENT + 8),  # mov rax, [0x200008]
        ("48 89 04 25 10 f0 1f 00", 14, 3, READ_ONLY + 0x10),  # mov [0x1ff010], rax
        ("0f 0b", 6, None, 0),  # ud2
        ("48 f7 f6", 0, None, 0),  # div rsi
        ("0f 00 de", 13, 0x1000, 0),  # ltr si, of a selector beyond the GDT
        ("cd 60", 13, 0x60 * 8 + 2, 0),  # int 0x60, which has no gate
        ("cd 61", 11, 0x61 * 8 + 2, 0),  # int 0x61, whose gate is not present
    ],
)
def test_exceptions_in_long_mode(
    guest: Guest, program: str, vector: int, error_code: int | None, cr2: int
) -> None:
    guest.start_long(code(program))
    state = guest.vcpu.get_state()
    state["env.regs"][x86.RSI] = 0x1000 if vector == 13 else 0
    guest.vcpu.set_state(state)
    guest.set_gate(0x61, STOP, kind=0x0E)
    guest.set_gate(vector, STOP)
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    rsp = state["env.regs"][x86.RSP]
    assert state["env.eip"] == HANDLERS + 16 * vector + 2
    if error_code is not None:
        assert guest.read(rsp) == error_code
        rsp += 8
    frame = [guest.read(rsp + 8 * i) for i in range(5)]
    assert frame[:2] == [CODE, CODE_SELECTOR]
    assert frame[2] & ~0x10000 == 2  # RFLAGS, with or without RF
    assert frame[3:] == [LEVEL_0_STACK, DATA_SELECTOR]
    assert state["env.cr"][2] == cr2


def test_from_user_to_kernel_in_long_mode(guest: Guest) -> None:
    source = guest.vcpu.interrupt_source = Source()
    guest.start_long(COUNTER_LONG, level=3, rflags=RFLAGS_IF | 2)
    guest.set_gate(0x50, STOP)
    with guest.running():
        wait_for(lambda: guest.read(0x8000) > 1000, "the counter")
        source.vectors.append(0x50)
        guest.vcpu.interrupt()
        wait_for(lambda: not source.vectors, "the interrupt")
    state = guest.vcpu.get_state()
    rsp = state["env.regs"][x86.RSP]
    assert rsp == LEVEL_0_STACK - 40
    assert guest.read(rsp + 8) == USER_CODE_SELECTOR
    assert guest.read(rsp + 24) == LEVEL_3_STACK
    assert guest.read(rsp + 32) == USER_DATA_SELECTOR
    assert state["env.segs"][x86.SS]["selector"] == 0
    assert state["env.segs"][x86.CS]["selector"] == CODE_SELECTOR
    assert not state["env.eflags"] & RFLAGS_IF


def test_user_code_needs_a_gate_of_its_level(guest: Guest) -> None:
    guest.start_long(code("cd 70"), level=3)  # int 0x70
    guest.set_gate(0x70, STOP)
    guest.set_gate(13, STOP)
    assert guest.run() == base.KICKED
    assert guest.vcpu.get_state()["env.eip"] == HANDLERS + 16 * 13 + 2
    guest.start_long(code("cd 70"), level=3)
    guest.set_gate(0x70, STOP, kind=0xEE)
    assert guest.run() == base.KICKED
    assert guest.vcpu.get_state()["env.eip"] == HANDLERS + 16 * 0x70 + 2


def test_interrupt_stack_table(guest: Guest) -> None:
    guest.start_long(code("0f 0b"))  # ud2
    guest.set_gate(6, STOP, table=1)
    assert guest.run() == base.KICKED
    assert guest.vcpu.get_state()["env.regs"][x86.RSP] == TABLE_STACK - 40
    assert guest.read(TABLE_STACK - 16) == LEVEL_0_STACK


def test_double_fault(guest: Guest) -> None:
    """A page fault whose gate is missing."""
    guest.start_long(code("48 8b 04 25 00 00 20 00"))  # mov rax, [0x200000]
    guest.set_gate(8, STOP)
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    assert state["env.eip"] == HANDLERS + 16 * 8 + 2
    assert guest.read(state["env.regs"][x86.RSP]) == 0


def test_from_user_to_kernel_in_protected_mode(guest: Guest) -> None:
    guest.start_32(code("cd 70"), level=3, rflags=RFLAGS_IF | 2)  # int 0x70
    guest.set_gate_32(0x70, STOP, kind=0xEF)
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    esp = state["env.regs"][x86.RSP]
    frame = [guest.read(esp + 4 * i, 4) for i in range(5)]
    assert esp == LEVEL_0_STACK - 20
    assert frame[:2] == [CODE + 2, USER_CODE_SELECTOR]
    assert frame[3:] == [LEVEL_3_STACK, USER_DATA_SELECTOR]
    assert state["env.segs"][x86.SS]["selector"] == DATA_SELECTOR
    assert state["env.eflags"] & RFLAGS_IF  # a trap gate leaves it


def test_exception_with_error_code_in_protected_mode(guest: Guest) -> None:
    guest.start_32(code("66 b8 00 10", "8e d8"))  # mov ax, 0x1000; mov ds, ax
    guest.set_gate_32(13, STOP)
    assert guest.run() == base.KICKED
    esp = guest.vcpu.get_state()["env.regs"][x86.RSP]
    assert [guest.read(esp + 4 * i, 4) for i in range(3)] == [0x1000, CODE + 4, CODE_SELECTOR]


def test_syscall_and_sysret(guest: Guest) -> None:
    guest.start_long(
        code(
            "b8 07 00 00 00",  # mov eax, 7
            "0f 05",  # syscall
            "48 89 04 25 00 80 00 00",  # mov [0x8000], rax
            "e6 f4",  # out 0xf4, al
        ),
        level=3,
        rflags=RFLAGS_IF | 0x3002,
    )
    guest.write(
        HANDLERS,
        code(
            "48 89 0c 25 08 80 00 00",  # mov [0x8008], rcx
            "4c 89 1c 25 10 80 00 00",  # mov [0x8010], r11
            "9c",  # pushfq
            "8f 04 25 18 80 00 00",  # pop qword ptr [0x8018]
            "8c 14 25 20 80 00 00",  # mov [0x8020], ss
            "ff c0",  # inc eax
            "48 0f 07",  # sysretq
        ),
    )
    state = guest.vcpu.get_state()
    msrs = {0xC0000081: 0x0013_0008 << 32, 0xC0000082: HANDLERS, 0xC0000084: RFLAGS_IF}
    entries = [{"index": index, "data": data} for index, data in msrs.items()]
    guest.vcpu.set_state(state | {"cpu/msrs": {"nmsrs": 3, "entries": entries}})
    assert guest.run() == base.KICKED
    assert guest.read(0x8000) == 8
    assert guest.read(0x8008) == CODE + 7
    assert guest.read(0x8010) == RFLAGS_IF | 0x3002
    assert guest.read(0x8018) == 0x3002
    assert guest.read(0x8020, 2) == DATA_SELECTOR
    assert guest.vcpu.get_state()["env.segs"][x86.CS]["selector"] == USER_CODE_SELECTOR


def test_sysenter(guest: Guest) -> None:
    guest.start_32(code("0f 34"), level=3)  # sysenter
    guest.write(HANDLERS, STOP)
    msrs = {0x174: CODE_SELECTOR, 0x175: LEVEL_0_STACK, 0x176: HANDLERS}
    entries = [{"index": index, "data": data} for index, data in msrs.items()]
    state = guest.vcpu.get_state() | {"cpu/msrs": {"nmsrs": 3, "entries": entries}}
    guest.vcpu.set_state(state)
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    assert state["env.eip"] == HANDLERS + 2
    assert state["env.regs"][x86.RSP] == LEVEL_0_STACK
    assert state["env.segs"][x86.SS]["selector"] == DATA_SELECTOR


def test_syscall_that_is_not_enabled(guest: Guest) -> None:
    guest.start_long(code("0f 05"))
    guest.set_gate(6, STOP)
    guest.vcpu.set_state(guest.vcpu.get_state() | {"env.efer": x86.EFER_LME | x86.EFER_LMA})
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    assert state["env.eip"] == HANDLERS + 16 * 6 + 2
    assert guest.read(state["env.regs"][x86.RSP]) == CODE


def test_triple_fault(guest: Guest) -> None:
    guest.write(0x7D00, bytes(6))
    guest.start_real(code("0f 01 1e 00 7d", "cc"))  # lidt [0x7d00]; int3
    assert guest.run() == base.SHUTDOWN
    guest.start_real(COUNTER)
    with guest.running():
        wait_for(lambda: guest.read(0x8000, 4) > 0, "the counter after the reset")


def filled_state() -> dict:
    """A state in which every register has a value of its own."""
    state = real_mode_state(0)
    state["env.regs"] = [0x1010101010101010 * i + i for i in range(16)]
    state["env.eip"] = 0x123456
    state["env.eflags"] = 0x46 | RFLAGS_IF | 0x400
    state["env.segs"] = [
        x86.segment(8 * i, 0x10000 * i, 0xFFF00 + i, 0x00C09300 if i != x86.CS else 0x00C09B00)
        for i in range(1, 7)
    ]
    state["env.segs"][x86.FS]["base"] = 0x123456789A00
    state["env.ldt"] = x86.segment(0x40, 0x5000, 0x1FF, 0x8200)
    state["env.tr"] = x86.segment(0x48, 0x6000, 0x67, 0x8B00)
    state["env.gdt"] = x86.segment(0, 0xFFFF800000001000, 0x1FF)
    state["env.idt"] = x86.segment(0, 0xFFFF800000002000, 0xFFF)
    state["env.cr"] = [0x80050033, 0, 0xFFFF888800001234, 0x7654321000, 0x6A0]
    state["env.dr"] = [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xFFFF0FF0, 0x400]
    state["env.efer"] = 0xD01
    state["env.tsc"] = 123456789012
    state["env.tsc_khz"] = tcg.TSC_KHZ
    state["env.interrupt_shadow"] = 1
    xsave = bytearray(x86.XSAVE_SIZE)
    xsave[0:2] = (0x0F7F).to_bytes(2, "little")  # FCW: round towards zero
    xsave[2:4] = (0x3 << 11 | 0x100).to_bytes(2, "little")  # FSW: ST0 is register 3
    xsave[4] = 0b00111000
    xsave[6:8] = (0x1D9).to_bytes(2, "little")
    xsave[8:24] = (0x401000).to_bytes(8, "little") + (0x402000).to_bytes(8, "little")
    xsave[24:32] = (0x5F80).to_bytes(4, "little") + (0xFFFF).to_bytes(4, "little")
    for i in range(8):
        xsave[32 + 16 * i : 42 + 16 * i] = bytes(range(i + 1, i + 9)) + bytes([i, 0x40])
    xsave[160:416] = bytes(range(256))
    xsave[512] = 7
    xsave[576:832] = bytes(reversed(range(256)))
    state["env.xsave_buf"] = bytes(xsave)
    entries = [{"index": index, "data": 0} for index in tcg.MSRS]
    for entry in entries:
        if entry["index"] >= 0xC0000081 or entry["index"] in (0x175, 0x176):
            entry["data"] = 0x1000 + entry["index"]
    state["cpu/msrs"] = {"nmsrs": len(entries), "entries": entries}
    return state


def test_state_is_given_back_as_it_was_set(guest: Guest) -> None:
    state = filled_state()
    guest.vcpu.set_state(state)
    given_back = guest.vcpu.get_state()
    assert given_back == state
    guest.vcpu.set_state(x86.reset_state(0))
    guest.vcpu.set_state(given_back)
    assert guest.vcpu.get_state() == state


def test_state_without_msrs_keeps_them(guest: Guest) -> None:
    guest.vcpu.set_state(filled_state())
    msrs = guest.vcpu.get_state()["cpu/msrs"]
    guest.vcpu.set_state(x86.reset_state(0))
    assert guest.vcpu.get_state()["cpu/msrs"] == msrs


def floating_guest(guest: Guest) -> None:
    guest.start_long(FLOATING)
    guest.write(0x8020, struct.pack("<2d", 1.1171, 0.9957))


def test_guest_continues_exactly_in_a_new_vcpu(guest: Guest) -> None:
    """The results of a million rounds with x87, SSE and integers, with 20 moves and without."""
    floating_guest(guest)
    assert guest.run() == base.KICKED
    expected = bytes(guest.ram[0x8000:0x8020])

    floating_guest(guest)
    current = guest
    state = guest.vcpu.get_state()
    moves = 0
    while state["env.mp_state"] != x86.MP_HALTED:
        current = Guest(ram=guest.ram)
        current.vcpu.set_state(state)
        timer = threading.Timer(0.004, current.vcpu.kick)
        timer.start()
        assert current.run() == base.KICKED
        timer.join()
        state = current.vcpu.get_state()
        current.close()
        moves += 1
    assert moves > 1
    assert bytes(guest.ram[0x8000:0x8020]) == expected


CONTINUE_ELSEWHERE = """
import ast, mmap, sys
from tcg_guest import Guest, RAM_SIZE
guest = Guest(ram=mmap.mmap(int(sys.argv[1]), RAM_SIZE))
guest.vcpu.set_state(ast.literal_eval(sys.stdin.read()))
print(guest.run())
"""


def test_guest_continues_in_a_new_process(guest: Guest) -> None:
    floating_guest(guest)
    assert guest.run() == base.KICKED
    expected = bytes(guest.ram[0x8000:0x8020])

    fd = os.memfd_create("ram")
    os.truncate(fd, RAM_SIZE)
    shared = Guest(ram=mmap.mmap(fd, RAM_SIZE))
    floating_guest(shared)
    with shared.running():
        pass
    state = shared.vcpu.get_state()
    shared.close()
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", CONTINUE_ELSEWHERE, str(fd)],
        input=repr(state),
        pass_fds=[fd],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    os.close(fd)
    assert result.stdout == "kicked\n"
    assert bytes(shared.ram[0x8000:0x8020]) == expected


def test_tsc_stands_still_while_nothing_runs(guest: Guest) -> None:
    guest.start_real(
        code(
            "0f 31",  # rdtsc
            "66 a3 00 80",  # mov [0x8000], eax
            "66 89 16 04 80",  # mov [0x8004], edx
            "e6 f4",  # out 0xf4, al
            "e9 f0 ff",  # jmp to the start
        )
    )
    guest.vcpu.set_state(guest.vcpu.get_state() | {"env.tsc": 1 << 40})
    assert guest.run() == base.KICKED
    first = guest.read(0x8000)
    assert 1 << 40 <= first < guest.vcpu.get_state()["env.tsc"]
    saved = guest.vcpu.get_state()
    assert guest.vcpu.get_state()["env.tsc"] == saved["env.tsc"]
    guest.vcpu.set_state(saved)
    assert guest.run() == base.KICKED
    assert guest.read(0x8000) > first


def test_two_vcpus_take_turns(pair: Guest) -> None:
    for index in range(2):
        pair.start_long(SHARED_COUNTER_LONG, index=index)
        state = pair.vcpus[index].get_state()
        state["env.regs"][x86.RBX] = 0x8100 + 0x100 * index
        pair.vcpus[index].set_state(state)
    with pair.running():
        for address in (0x8100, 0x8200) * 3:
            wait_for_change(lambda a=address: pair.read(a), "its counter")  # type: ignore[misc]
    own = pair.read(0x8100) + pair.read(0x8200)
    assert 0 <= pair.read(0x8000) - own <= 2  # a vCPU may have stopped between the two


def test_start_up_ipi(pair: Guest) -> None:
    pair.write(
        0x7000,
        code(
            "8c c8",  # mov ax, cs
            "a3 00 80",  # mov [0x8000], ax
            "66 b8 01 00 00 00",  # mov eax, 1
            "0f a2",  # cpuid
            "66 c1 eb 18",  # shr ebx, 24
            "88 1e 02 80",  # mov [0x8002], bl
            "f4",  # hlt
        ),
    )
    pair.start_real(COUNTER)
    second = pair.vcpus[1]
    assert second.get_state()["env.mp_state"] == x86.MP_UNINITIALIZED
    with pair.running():
        wait_for(lambda: pair.read(0x8000, 4) > 0, "the first vCPU")
        second.init()
        second.sipi(7)
        wait_for(lambda: pair.read(0x8002, 1) == 1, "the second vCPU")
    assert second.get_state()["env.mp_state"] == x86.MP_HALTED


def test_init_resets_but_keeps_the_fpu_and_msrs(pair: Guest) -> None:
    second = pair.vcpus[1]
    state = filled_state()
    second.set_state(state)
    second.init()
    after = second.get_state()
    assert after["env.mp_state"] == x86.MP_INIT_RECEIVED
    assert after["env.cr"] == x86.reset_state(1)["env.cr"]
    assert after["env.xsave_buf"] == state["env.xsave_buf"]
    assert after["cpu/msrs"] == state["cpu/msrs"]
    second.sipi(0x9A)
    after = second.get_state()
    assert after["env.mp_state"] == x86.MP_RUNNABLE
    assert after["env.segs"][x86.CS]["base"] == 0x9A000


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcg, "LIBRARY", "unicorn/lib/libmissing.so")
    with pytest.raises(ConfigError, match=r"pip install 'cpr-vmm\[tcg\]'"):
        tcg.TcgAccelerator()
