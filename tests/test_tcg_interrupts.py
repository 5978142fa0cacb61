"""The TCG accelerator: interrupts, exceptions, HLT and system calls, in all modes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tcg_guest import (
    ABSENT,
    CODE,
    CODE_SELECTOR,
    COUNTER,
    COUNTER_LONG,
    DATA_SELECTOR,
    HANDLERS,
    LEVEL_0_STACK,
    LEVEL_3_STACK,
    READ_ONLY,
    REAL_CODE,
    RFLAGS_IF,
    STOP,
    TABLE_STACK,
    USER_CODE_SELECTOR,
    USER_DATA_SELECTOR,
    Guest,
    Source,
    code,
    require_tcg,
)
from waiting import wait_for, wait_for_change

from cpr.accel import base, x86

require_tcg()
pytestmark = pytest.mark.tcg

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
COUNT_INTERRUPT_LONG = code(
    "48 ff 04 25 10 80 00 00",  # inc qword ptr [0x8010]
    "48 cf",  # iretq
)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


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


def test_page_fault_of_user_code(guest: Guest) -> None:
    guest.start_long(code("48 8b 04 25 08 00 20 00"), level=3)  # mov rax, [0x200008]
    guest.set_gate(14, STOP)
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    frame = [guest.read(state["env.regs"][x86.RSP] + 8 * i) for i in range(6)]
    assert frame == [4, CODE, USER_CODE_SELECTOR, 2, LEVEL_3_STACK, USER_DATA_SELECTOR]
    assert state["env.cr"][2] == ABSENT + 8


def test_single_step(guest: Guest) -> None:
    guest.set_vector(1, 0x7E00)
    guest.write(0x7E00, STOP)
    guest.start_real(
        code(
            "9c",  # pushf
            "58",  # pop ax
            "80 cc 01",  # or ah, 1: TF
            "50",  # push ax
            "9d",  # popf
            "90",  # nop
            "90",  # nop
        )
    )
    assert guest.run() == base.KICKED
    state = guest.vcpu.get_state()
    assert state["env.eip"] == 0x7E02
    assert guest.read(state["env.regs"][x86.RSP], 2) == REAL_CODE + 8
