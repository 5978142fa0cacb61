"""staging.py: passes, marks and walking back, with an accelerator whose log the test writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from descriptors import open_fds

from cpr import ram_backend
from cpr.constants import MIB
from cpr.constants import PAGE_SIZE as PAGE
from cpr.errors import KernelError, MigrationError
from cpr.memory import GuestMemory
from cpr.migration import staging
from cpr.migration.mode import TRANSFER, KeepsRam
from cpr.migration.parameters import Parameters
from cpr.migration.statistics import RamCounters
from cpr.state.fds import PreservedFds

SIZE = 8 * MIB
LOW = 160 * PAGE  # as on a PC: conventional memory
LAST_START = 1 << 32
LAST_OFFSET = SIZE - 3 * PAGE


class FakeAccel:
    """`on_take()` is the guest: it runs when a log is taken, before that is done."""

    dirty_log = True

    def __init__(self, memory: GuestMemory) -> None:
        self.calls: list[str] = []
        self.on_take: Callable[[], None] = lambda: None
        self.refuses = False
        self._memory = memory
        self._written: set[int] = set()

    def guest_writes(self, address: int, data: bytes) -> None:
        section = self._memory.find(address)
        assert section is not None
        block, written = section.block, section.block.written
        block.written = None
        block.write(section.offset + address - section.start, data)
        block.written = written
        self._written.add(address // PAGE)

    def start_dirty_log(self) -> None:
        if self.refuses:
            raise KernelError("KVM_SET_USER_MEMORY_REGION", errno.ENOMEM)
        self.calls.append("start")

    def stop_dirty_log(self) -> None:
        self.calls.append("stop")

    def take_dirty_log(self, address: int, size: int) -> bytearray:
        if address == 0:
            self.on_take()
        first, count = address // PAGE, size // PAGE
        taken = {page for page in self._written if first <= page < first + count}
        self._written -= taken
        bits = sum(1 << (page - first) for page in taken)
        return bytearray(bits.to_bytes((count + 63) // 64 * 8, "little"))


class Guest:
    """8 MiB in three sections, the last of which is not at a word of the bitmap; a ROM."""

    def __init__(self, share: bool = False) -> None:
        self.fds = PreservedFds()
        self.memory = GuestMemory()
        config = SimpleNamespace(
            id="ram0", qom_type="memory-backend-ram", properties={"size": SIZE, "share": share}
        )
        self.block = self.memory.add_block(ram_backend.create_backend_block(config, self.fds))
        self.rom = self.memory.add_block(
            ram_backend.create_aux_block("pc.rom", MIB, False, self.fds)
        )
        self.memory.add_section(0, LOW, self.block, 0, False, "low")
        self.memory.add_section(MIB, LAST_OFFSET - MIB, self.block, MIB, False, "middle")
        self.memory.add_section(LAST_START, 3 * PAGE, self.block, LAST_OFFSET, False, "last")
        self.memory.add_section(0xC0000, MIB // 4, self.rom, 0, True, "rom")
        self.accel = FakeAccel(self.memory)
        self.machine = SimpleNamespace(
            memory=self.memory, blocks=self.memory.blocks, accel=self.accel, devices=[]
        )
        self.parameters = Parameters()
        self.parameters.set({"max-bandwidth": 0, "downtime-limit": 0})
        self.counters = RamCounters()
        self.passes: list[int] = []

    def stage(self, page_size: int = 0, regenerates: bool = True) -> staging.Staging:
        blocks = staging.wanted(self.machine, regenerates, page_size)
        return staging.Staging(
            self.machine, self.fds, self.parameters, blocks, self.counters, self.passes.append
        )

    def copied(self) -> bytes:
        return os.pread(self.block.copy_fd, SIZE, 0)

    def own(self) -> bytes:
        return bytes(self.block.view(0, SIZE))


@pytest.fixture
def guest():
    guest = Guest()
    yield guest
    guest.memory.close()


def test_passes_until_nothing_is_left(guest):
    turns: list[None] = []

    def run():
        turns.append(None)
        if len(turns) < 4:
            for address in (
                0,
                LOW - PAGE,
                2 * MIB + len(turns) * PAGE,
                LAST_START + 2 * PAGE,
            ):
                guest.accel.guest_writes(address, bytes([len(turns)]) * PAGE)

    guest.accel.on_take = run
    guest.memory.write(MIB, b"before" * 1000)
    stage = guest.stage()
    stage.live()
    assert guest.passes == [1, 2, 3, 4, 5], "the fourth log was empty"
    assert guest.copied() == guest.own()
    assert guest.counters.remaining == 0
    assert guest.counters.total == SIZE
    assert guest.counters.duplicate == SIZE // PAGE - 2
    assert guest.counters.normal == 2 + 3 * 4
    assert guest.counters.transferred == guest.counters.precopy == (2 + 3 * 4) * PAGE
    guest.accel.guest_writes(5 * MIB, b"last words")
    stage.finish()
    assert guest.copied() == guest.own()
    assert guest.counters.query(SimpleNamespace(total_ns=1))["downtime-bytes"] == PAGE
    stage.close()


def test_what_the_vmm_itself_writes_is_copied_too(guest):
    """As a device does by DMA; over the end of a section, and into a page that no log tells of."""
    writes = [(LOW - 2, b"ab"), (3 * MIB - 1, b"wxyz"), (LAST_START, b"l" * PAGE)]

    def run():
        if writes:
            guest.memory.write(*writes.pop())

    guest.accel.on_take = run
    stage = guest.stage()
    stage.live()
    assert not writes
    assert guest.copied() == guest.own()
    guest.block.write(7 * MIB, b"at the last moment")
    stage.finish()
    assert guest.copied() == guest.own()
    stage.close()
    assert guest.block.written is None
    guest.memory.write(0, b"not marked any more")


def test_a_page_that_became_zero_is_zero_in_the_copy(guest):
    guest.memory.write(4 * MIB, b"x" * PAGE)
    stage = guest.stage()
    stage.live()
    guest.accel.guest_writes(4 * MIB, bytes(PAGE))
    stage.finish()
    assert guest.copied() == guest.own() == bytes(SIZE)
    stage.close()


def test_without_a_log_all_is_copied_at_the_end(guest):
    guest.accel.dirty_log = False
    guest.memory.write(4 * MIB, b"x" * PAGE)
    stage = guest.stage()
    stage.live()
    assert guest.passes == []
    assert guest.copied() == bytes(SIZE)
    guest.memory.write(5 * MIB, b"y" * PAGE)
    stage.finish()
    assert guest.copied() == guest.own()
    assert (guest.passes, guest.counters.precopy) == ([1], 0)
    stage.close()
    assert guest.accel.calls == []


def test_the_downtime_limit_ends_the_passes(guest):
    turns: list[None] = []

    def run():
        turns.append(None)
        guest.accel.guest_writes(2 * MIB, bytes([len(turns)]) * PAGE)
        if len(turns) == 3:
            guest.parameters.set({"avail-switchover-bandwidth": PAGE * 10, "downtime-limit": 99})
        if len(turns) == 5:
            guest.parameters.set({"downtime-limit": 100})

    guest.accel.on_take = run
    stage = guest.stage()
    stage.live()
    assert len(turns) == 5, "one page takes 100 ms"
    assert guest.counters.expected_downtime == 100
    assert guest.counters.remaining == PAGE
    assert guest.copied() != guest.own()
    guest.accel.on_take = lambda: None
    stage.finish()
    assert guest.copied() == guest.own()
    stage.close()


@pytest.mark.parametrize("share", [False, True])
def test_close_is_the_inverse(share):
    guest = Guest(share)
    before, entries = set(open_fds()), guest.fds.entries()
    if share:
        assert staging.wanted(guest.machine, True, 0) == []
        assert staging.wanted(guest.machine, True, PAGE) == []
        guest.block.page_size = 2 * PAGE
    stage = guest.stage(page_size=PAGE)
    assert guest.fds.find("ram0", 0) == guest.block.copy_fd != guest.block.fd
    stage.live()
    stage.close()
    stage.close()
    assert guest.fds.entries() == entries
    assert set(open_fds()) == before
    assert guest.block.copy_fd == -1
    assert guest.accel.calls == ["start", "stop"]
    guest.memory.close()


def test_handing_over_keeps_the_descriptors(guest):
    stage = guest.stage(regenerates=False)
    stage.live()
    stage.finish()
    stage.hand_over()
    assert guest.accel.calls == ["start", "stop"]
    assert [name for name, _, _ in guest.fds.entries()] == ["ram0", "pc.rom"]
    assert guest.copied() == guest.own()
    stage.close()
    assert guest.fds.entries() == []


def test_a_log_that_cannot_be_had(guest):
    guest.accel.refuses = True
    stage = guest.stage()
    with pytest.raises(KernelError, match="KVM_SET_USER_MEMORY_REGION"):
        stage.live()
    stage.close()
    assert guest.accel.calls == []
    assert guest.fds.entries() == []


def test_cancel_ends_a_pass_and_a_wait(guest):
    guest.parameters.set({"max-bandwidth": PAGE})
    guest.memory.write(0, os.urandom(64 * PAGE))
    stage = guest.stage()
    stage.cancel()
    stage.live()
    assert guest.counters.copied == 0
    stage.close()


def test_too_little_memory_is_refused_before_anything_is_done(guest, monkeypatch):
    guest.memory.write(MIB, os.urandom(2 * MIB))
    before = set(open_fds())
    monkeypatch.setattr(staging, "available", lambda page_size: MIB)
    with pytest.raises(MigrationError, match=r"needs \d+ MiB of memory and 1 MiB are available"):
        guest.stage()
    assert set(open_fds()) == before
    assert guest.fds.entries() == []


def test_blockers_with_and_without_staging(guest):
    mode = KeepsRam(TRANSFER)
    mode.regenerates = False
    reasons = mode.blockers(guest.machine)
    assert [reason.split()[2] for reason in reasons] == ["ram0", "pc.rom"]
    mode.stages = True
    assert mode.blockers(guest.machine) == []
