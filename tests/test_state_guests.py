"""Guests that notice when a part of their VM's state is lost, on every way from VMM to VMM."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import staged_guest
from conftest import ROOT, missing_kvm
from updating import WAYS, Journey
from waiting import wait_for, wait_for_change

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(missing_kvm() is not None, reason=str(missing_kvm())),
]

SOURCES = Path(__file__).parent / "guests"
TSC_DEADLINE, X2APIC = ("tsc-deadline", 24), ("x2apic", 21)  # bits of CPUID leaf 1, ecx
SOON, FAR = 100_000_000, 2_500_000_000  # TSC ticks
READY = 0x8000
every_way = pytest.mark.parametrize("travel", list(WAYS), indirect=True)
DIFFERENT_WAYS = ["stop-cont", "early", "late", "defer", "transfer", "reboot", "staging"]


@functools.cache
def build(name: str, **symbols: int) -> bytes:
    """The guest `name`, with its symbols set, as the content of a floppy."""
    macros = [f"-D{symbol}={value}" for symbol, value in symbols.items()]
    include = ["-I", str(ROOT / "examples"), *macros]
    assemble = ["gcc", "-m64", "-Wa,--fatal-warnings", "-Wa,-mx86-used-note=no", *include]
    link = ["ld", "-m", "elf_x86_64", "-n", "-z", "noexecstack", "-Ttext=0x7c00", "-e", "start16"]
    with tempfile.TemporaryDirectory() as folder:
        code, image = Path(folder, "code"), Path(folder, "image")
        subprocess.run([*assemble, "-c", "-o", code, SOURCES / f"{name}.S"], check=True)
        subprocess.run([*link, "--oformat", "binary", "-o", image, code], check=True)
        return image.read_bytes()


class Guest(Journey):
    """A detector under way; addresses are of its memory map."""

    def read(self, address: int, size: int = 4) -> int:
        unit = {1: "b", 4: "w", 8: "g"}[size]
        shown = self.vm.qmp.hmp(f"xp /1x{unit} {address:#x}")
        return int(shown.split(":")[1], 16)

    def write(self, address: int, value: int) -> None:
        staged_guest.write(self.vm, "ram0", address, value.to_bytes(4, "little"))

    def moves_on(self, address: int, what: str, steps: int = 5) -> int:
        return wait_for_change(lambda: self.read(address), what, steps)


@pytest.fixture(params=DIFFERENT_WAYS)
def travel(request, start, tmp_path):
    """Boots a guest, waits until it is ready, and returns it with the function that moves it."""
    way, backend, options = WAYS[request.param]

    def boot(name: str, **symbols: int):
        image = tmp_path / f"{name}.img"
        image.write_bytes(build(name, **symbols))
        guest = Guest(start, tmp_path, str(image), backend, options)
        wait_for(lambda: guest.read(READY) == 1, "the guest is ready")

        def go() -> None:
            way(guest)
            guest.wait_running()

        return guest, go

    return boot


def needs(feature: tuple[str, int]) -> None:
    """Skips where this host's KVM does not give its guests a feature."""
    from cpr.accel.kvm import KvmAccelerator

    name, bit = feature
    accel = KvmAccelerator()
    try:
        leaves = {entry[0]: entry for entry in accel.supported_cpuid() if entry[1] == 0}
    finally:
        accel.close()
    if not leaves[1][5] >> bit & 1:
        pytest.skip(f"this host's KVM has no {name}")


def test_tsc_deadline_that_is_armed_again(travel):
    needs(TSC_DEADLINE)
    guest, go = travel("tsc-deadline", TICKS=SOON, REARM=1)
    guest.moves_on(0x8004, "interrupts before")
    go()
    guest.moves_on(0x8004, "interrupts after")


@every_way
def test_tsc_deadline_far_ahead(travel):
    needs(TSC_DEADLINE)
    guest, go = travel("tsc-deadline", TICKS=FAR, REARM=0)
    go()
    deadline = guest.read(0x8010, 8)
    wait_for(lambda: guest.read(0x8004) == 1, "the one interrupt")
    assert guest.read(0x8010, 8) == deadline
    assert guest.read(0x8018, 8) >= deadline


def test_x2apic_mode(travel):
    needs(X2APIC)
    guest, go = travel("x2apic")
    guest.moves_on(0x8004, "interrupts before")
    base = guest.read(0x8010)
    assert base >> 10 & 3 == 3
    go()
    guest.moves_on(0x8004, "interrupts after")
    assert guest.read(0x8008) == 0, "faults"
    assert guest.read(0x800C) == 0, "its ID"
    assert guest.read(0x8010) == base


GUEST_STOPPED = 2  # of the flags of a pvclock


def test_the_clock_tells_that_the_guest_stood_still(travel):
    guest, go = travel("pvclock")
    assert not guest.read(0x901D, 1) & GUEST_STOPPED
    go()
    guest.moves_on(0x8004, "rounds after")
    assert guest.read(0x901D, 1) & GUEST_STOPPED


PERIODIC, ONCE = (2, 3), (0, 4)
KEPT = 0x3F  # of a PIT's status: all but OUT and whether the count is loaded


@pytest.mark.parametrize("mode", range(6))
def test_pit_mode(travel, mode):
    """Modes 1 and 5 need an edge of the gate, which channel 0 does not have."""
    guest, go = travel("pit-mode", MODE=mode, COUNT=11932, RELOAD=int(mode in ONCE))
    statuses = [0x30 | mode << 1] * 2
    guest.moves_on(0x8008, "rounds before")
    assert [guest.read(address, 1) & KEPT for address in (0x800C, 0x800D)] == statuses
    if mode in PERIODIC + ONCE:
        guest.moves_on(0x8004, "interrupts before")
    go()
    guest.moves_on(0x8008, "rounds after")
    assert [guest.read(address, 1) & KEPT for address in (0x800C, 0x800D)] == statuses
    if mode in PERIODIC + ONCE:
        guest.moves_on(0x8004, "interrupts after")


@every_way
def test_msr_values(travel):
    guest, go = travel("msr-values")
    count = len(re.findall(r"^.*\.long", (SOURCES / "msr-values.S").read_text(), re.MULTILINE))
    guest.moves_on(0x8004, "rounds before", 3)
    before = [guest.read(0x8100 + 8 * i, 8) for i in range(count)]
    assert before[:5] == [
        0x80000006,
        0xF80000800,
        0x0606060606060606,
        0x0505050505050505,
        0xC06,
    ]
    assert before[6] == 0
    go()
    guest.moves_on(0x8004, "rounds after", 3)
    assert [guest.read(0x8100 + 8 * i, 8) for i in range(count)] == before


def test_debug_registers(travel):
    guest, go = travel("debug-registers")
    guest.moves_on(0x8004, "rounds before", 3)
    before = [guest.read(0x8100 + 4 * i) for i in range(5)]
    assert before[:3] == [0x11111111, 0x22222222, 0x33333333]
    go()
    guest.moves_on(0x8004, "rounds after", 3)
    assert [guest.read(0x8100 + 4 * i) for i in range(5)] == before
    guest.write(0x8008, 1)
    wait_for(lambda: guest.read(0x8010) == 1, "the marked instruction")
    assert guest.read(0x800C) == 1, "breakpoints hit"
    assert guest.read(0x8014) & 0xF == 8, "DR6"


def test_nmi_that_waits(travel):
    guest, go = travel("nmi-pending")
    guest.moves_on(0x8010, "rounds before")
    assert guest.read(0x8004) == 1
    go()
    guest.moves_on(0x8010, "rounds after")
    assert guest.read(0x8004) == 1, "NMIs stay blocked"
    guest.write(0x8008, 1)
    wait_for(lambda: guest.read(0x8004) == 2, "the second NMI")
    assert guest.read(0x800C) == 0


def test_window_after_sti(travel):
    """Likely to be met at some boundary of an instruction; test_kvm_state.py stops just there."""
    guest, go = travel("sti-window")
    guest.moves_on(0x8004, "interrupts before")
    go()
    guest.moves_on(0x8004, "interrupts after")
    assert guest.read(0x800C) == 0, "taken before the instruction after STI"
