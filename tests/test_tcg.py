"""The TCG accelerator: running and stopping, I/O, memory, several vCPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tcg_guest import (
    CODE_SELECTOR,
    COUNTER,
    GDT,
    PAGE_TABLES,
    RAM_SIZE,
    REAL_CODE,
    STOP,
    Guest,
    code,
    require_tcg,
)
from waiting import wait_for, wait_for_change

from cpr.accel import base, x86
from cpr.accel.tcg import accelerator, vcpu
from cpr.errors import ConfigError, KernelError

require_tcg()
pytestmark = pytest.mark.tcg

SHARED_COUNTER_LONG = code(
    "f0 48 ff 04 25 00 80 00 00",  # again: lock inc qword ptr [0x8000]
    "48 ff 03",  # inc qword ptr [rbx]
    "eb f2",  # jmp again
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


def test_code_that_another_has_written(guest: Guest) -> None:
    """The test writes it, as another vCPU would, and says what its interrupt would say."""
    counts = "ff 06 00 80 eb fa", "ff 06 10 80 eb fa"  # inc word [0x8000] or [0x8010]; jmp back
    guest.start_real(code(counts[0]))
    with guest.running():
        wait_for(lambda: guest.read(0x8000, 2) > 1000, "the counter")
    guest.write(REAL_CODE, code(counts[1]))
    guest.vcpu.forget_code()
    with guest.running():
        wait_for(lambda: guest.read(0x8010, 2) > 1000, "the other counter")


def test_a_breakpoint_that_another_has_taken_away(guest: Guest) -> None:
    handler = 0x9000
    guest.set_vector(3, handler)
    guest.write(handler, code("ff 06 00 80 cf"))  # inc word [0x8000]; iret
    guest.start_real(code("cc e6 f4 eb fb"))  # int3; out 0xf4, al; jmp back
    for expected in (1, 2):
        assert guest.run() == base.KICKED
        assert guest.read(0x8000, 2) == expected
    guest.write(REAL_CODE, b"\x90")
    assert guest.run() == base.KICKED
    assert guest.read(0x8000, 2) == 2
    guest.write(REAL_CODE, b"\xcc")
    guest.vcpu.forget_code()
    assert guest.run() == base.KICKED
    assert guest.read(0x8000, 2) == 3


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
            "a3 10 80",  # mov [0x8010], ax
            "66 b8 01 00 00 00",  # mov eax, 1
            "0f a2",  # cpuid
            "66 c1 eb 18",  # shr ebx, 24
            "88 1e 12 80",  # mov [0x8012], bl
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
        wait_for(lambda: pair.read(0x8012, 1) == 1, "the second vCPU")
    assert pair.read(0x8010, 2) == 0x700
    while second.get_state()["env.mp_state"] != x86.MP_HALTED:
        with pair.running(1):
            pass


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "LIBRARY", "unicorn/lib/libmissing.so")
    with pytest.raises(ConfigError, match=r"pip install 'cpr-vmm\[tcg\]'"):
        accelerator.TcgAccelerator()


def test_what_the_library_refuses_is_an_error(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingLibrary:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def cpr_tcg_run(self, native: object) -> int:
            return real.CPR_TCG_ERROR

        def cpr_tcg_problem(self, native: object) -> object:
            return text

    real = vcpu.lib
    text = vcpu.ffi.new("char[]", b"Invalid memory mapping (UC_ERR_MAP)")
    guest.start_real(STOP)
    monkeypatch.setattr(vcpu, "lib", FailingLibrary())
    with pytest.raises(KernelError, match=r"vCPU 0 at RIP 0x7c00: Invalid memory mapping"):
        guest.run()
