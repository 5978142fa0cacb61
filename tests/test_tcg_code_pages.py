"""The TCG accelerator: pages with translated code are told from others, whoever writes them."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tcg_guest import CODE, PAGE_TABLES, STOP, Bus, Guest, code, real_mode_state, require_tcg
from test_virtio_blk import DATA, IN, OK, Rig
from virtio_driver import RAM_SIZE, VirtioPlatform
from waiting import wait_for

from cpr.accel import base
from cpr.accel.tcg import TcgAccelerator

require_tcg()

FUNCTION, ALIAS = 0x50000, 0x1F0000


def function(value: int) -> bytes:
    return b"\xb8" + value.to_bytes(4, "little") + b"\xc3"  # mov eax, value; ret


def call_and_keep(place: int) -> bytes:
    return code(
        "b9 00 00 05 00",  # mov ecx, FUNCTION
        "ff d1",  # call rcx
        f"89 04 25 {place.to_bytes(4, 'little').hex()}",  # mov [place], eax
    )


def write_alias(value: int, offset: int) -> bytes:
    place = (ALIAS + offset).to_bytes(4, "little").hex()
    return code(f"c6 04 25 {place} {value:02x}")  # mov byte [ALIAS + offset], value


def test_code_that_is_written_by_another_address() -> None:
    """Also where the page was only data when it was first written there, and twice in one page."""
    guest = Guest()
    second = FUNCTION + 0x800
    guest.write(FUNCTION, function(0))
    guest.write(second, function(7))
    call_second = code(
        "b9 00 08 05 00",  # mov ecx, FUNCTION + 0x800
        "ff d1",  # call rcx
        "89 04 25 0c 80 00 00",  # mov [0x800c], eax
    )
    guest.start_long(
        write_alias(1, 1)
        + call_and_keep(0x8000)
        + call_second
        + write_alias(2, 1)
        + call_and_keep(0x8004)
        + write_alias(8, 0x801)
        + call_second
        + write_alias(3, 1)
        + call_and_keep(0x8008)
        + STOP
    )
    entry = PAGE_TABLES + 0x3000 + 8 * (ALIAS >> 12)
    guest.write(entry, (FUNCTION | 7).to_bytes(8, "little"))
    guest.run()
    assert [guest.read(0x8000 + 4 * n, 4) for n in range(4)] == [1, 2, 3, 8]
    guest.close()


LOOP = code(
    "31 c0 8e d8",  # xor ax, ax; mov ds, ax
    "bb 00 20",  # mov bx, DATA
    "ff d3",  # again: call bx
    "a3 00 80",  # mov [0x8000], ax
    "ff 06 02 80",  # inc word [0x8002]
    "eb f5",  # jmp again
)


def test_code_that_a_disk_is_read_over(tmp_path: Path) -> None:
    """A vCPU executes it all the time, and takes no interrupts."""
    disk = tmp_path / "disk.img"
    programs = [code("b8") + n.to_bytes(2, "little") + code("c3") for n in range(1, 9)]
    disk.write_bytes(b"".join(program.ljust(512, b"\x90") for program in programs))
    accel = TcgAccelerator()
    platform = VirtioPlatform(accel)
    accel.map_ram(0, RAM_SIZE, platform.ram.host)
    rig = Rig(disk, platform)
    rig.driver.start()
    rig.driver.write(0x7C00, LOOP)
    rig.driver.write(DATA, code("b8 00 00 c3"))
    vcpu = accel.create_vcpu(0)
    vcpu.set_state(real_mode_state(0))

    def seen() -> tuple[int, int]:
        data = rig.driver.read(0x8000, 4)
        return int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little")

    def is_seen(number: int) -> bool:
        return seen()[0] == number

    with ThreadPoolExecutor(1) as thread:
        thread.submit(vcpu.run, Bus())
        try:
            wait_for(lambda: seen()[1], "the code to be executed")
            for number in range(1, 9):
                assert rig.do(IN, number - 1, 512) == OK
                wait_for(functools.partial(is_seen, number), "the new code")
        finally:
            vcpu.kick()
    vcpu.close()
    rig.close()
    accel.close()


class _Heap(ctypes.Structure):
    """What mallinfo2(3) gives, in bytes."""

    _fields_ = [
        ("arenas", 7 * ctypes.c_size_t),
        ("used", ctypes.c_size_t),
        ("free", 2 * ctypes.c_size_t),
    ]


def test_memory_is_bounded_for_code_that_is_always_new() -> None:
    """The library keeps an entry for each block of 1,000,000 that are one jump each: 40 MB."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("this C library has no mallinfo2(3)")
    mallinfo2.restype = _Heap
    guest = Guest()
    jump_to_next, start = b"\xeb\x00", 0x20000
    guest.write(start, jump_to_next * 1_000_000 + STOP)
    guest.start_32(b"\xe9" + (start - CODE - 5).to_bytes(4, "little"))  # jmp start
    before = mallinfo2().used
    assert guest.run() == base.KICKED
    assert mallinfo2().used - before < 30_000_000
    guest.close()
