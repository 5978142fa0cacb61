"""prealloc=on while a guest runs: the RAM ends populated, and the figure is the truth."""

from __future__ import annotations

import re

import pytest
from harness.vm import HEARTBEAT
from staged_guest import mapping
from waiting import wait_for, wait_for_change

from cpr import ram
from cpr.constants import MIB
from cpr.errors import ConfigError
from cpr.vmm import populate


def guest(start, accel):
    return start(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "64M"),
        *("-object", "memory-backend-memfd,id=ram0,size=64M,prealloc=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
    )


def told(vm):
    (backend,) = vm.qmp.command("query-memdev")
    return backend["x-cpr-populated"]


@pytest.mark.parametrize("updates", [1, 3], ids=["one", "before it has ended"])
def test_ram_ends_populated(start, accel, updates):
    vm = guest(start, accel)
    assert told(vm) == 64 * MIB, "at the start all of it is, before the guest runs"
    assert mapping(vm, "ram0")["Rss"] == 64 * MIB
    for _ in range(updates):
        vm.update()
    first = told(vm)
    assert first <= mapping(vm, "ram0")["Rss"], "what is told is there"
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest runs meanwhile")
    wait_for(lambda: told(vm) == 64 * MIB, "all is populated")
    assert mapping(vm, "ram0")["Rss"] == 64 * MIB
    table = vm.qmp.hmp("info ramblock").replace("\r\n", "\n")
    assert table == vm.qmp.command("x-query-ramblock")["human-readable-text"]
    header, row, *others = table.splitlines()
    assert header.endswith("  RO           Populated")
    assert re.search(r"rw  0x0000000004000000$", row)
    assert all(other.endswith("ro") for other in others)
    assert vm.complaints == ""


def test_the_end_of_the_vmm_ends_it(start, accel):
    vm = guest(start, accel)
    vm.update()
    vm.qmp.send("quit")
    assert vm.process.wait(10) == 0
    assert vm.complaints == ""


class Block:
    prealloc = True
    size = 8 * MIB
    populated = 0


def test_close_ends_it_between_steps(monkeypatch):
    steps = []

    def chunk(block):
        steps.append(block)
        return True

    monkeypatch.setattr(populate.ram, "populate_chunk", chunk)
    populator = populate.Populator([Block()], delay=0.0)
    wait_for(lambda: len(steps) >= 3, "it goes on")
    populator.close()
    done = len(steps)
    assert not populate.Populator([Block()], delay=60.0).close()
    assert len(steps) == done


def test_lack_of_memory_is_a_warning(monkeypatch, capfd):
    def chunk(block):
        raise ConfigError("cannot set up guest memory 'ram0': Cannot allocate memory")

    monkeypatch.setattr(populate.ram, "populate_chunk", chunk)
    populator = populate.Populator([Block()], delay=0.0)
    populator._ended.acquire()
    populator._ended.release()
    populator.close()
    assert capfd.readouterr().err == (
        "cpr-vmm: warning: cannot set up guest memory 'ram0': Cannot allocate memory\n"
    )


def test_only_what_asks_for_it(monkeypatch):
    block = Block()
    block.prealloc = False
    monkeypatch.setattr(populate.ram, "populate_chunk", ram.populate_chunk)
    populate.Populator([block], delay=0.0).close()
    assert block.populated == 0
