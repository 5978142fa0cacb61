"""The TCG accelerator: the state of a vCPU, and guests that go on from it elsewhere."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tcg_guest import (
    RAM_SIZE,
    RFLAGS_IF,
    Guest,
    code,
    real_mode_state,
    require_tcg,
)

from cpr.accel import base, x86
from cpr.accel.tcg.state import MSRS, TSC_KHZ

require_tcg()
pytestmark = pytest.mark.tcg

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

CONTINUE_ELSEWHERE = """
import ast, mmap, sys
from tcg_guest import Guest, RAM_SIZE
guest = Guest(ram=mmap.mmap(int(sys.argv[1]), RAM_SIZE))
guest.vcpu.set_state(ast.literal_eval(sys.stdin.read()))
print(guest.run())
"""


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
    state["env.tsc_khz"] = TSC_KHZ
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
    entries = [{"index": index, "data": 0} for index in MSRS]
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


def test_tsc_stands_still_while_time_does(guest: Guest) -> None:
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
    guest.accel.start_time(time.monotonic_ns())
    assert guest.run() == base.KICKED
    guest.accel.stop_time(time.monotonic_ns())
    first = guest.read(0x8000)
    assert 1 << 40 <= first < guest.vcpu.get_state()["env.tsc"]
    saved = guest.vcpu.get_state()
    assert guest.vcpu.get_state()["env.tsc"] == saved["env.tsc"]
    guest.vcpu.set_state(saved)
    guest.accel.start_time(time.monotonic_ns())
    assert guest.run() == base.KICKED
    assert guest.read(0x8000) > first


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
