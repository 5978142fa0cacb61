"""The state of a KVM VM as the kernel has it: the same as by fields, and only among equals."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT, missing_kvm
from harness.vm import Vm
from test_kvm_state import FAR, LVT_TIMER, SVR, TSC_DEADLINE_MODE, TestVm, make  # noqa: F401
from waiting import wait_for

from cpr.accel import x86
from cpr.accel.kvm import msrs
from cpr.accel.kvm.native import VCPU_SIZE
from cpr.devices.system import NativeState
from cpr.errors import ConfigError, KernelError

pytestmark = pytest.mark.skipif(missing_kvm() is not None, reason=str(missing_kvm()))

MTRR_DEFAULT = 0xC06
CHIPS = ("i8259-0", "i8259-1", "ioapic", "i8254")


def unlike_power_on(vm: TestVm) -> None:
    """Gives a VM a state of which each part is another than a new VM's."""
    page = bytearray(vm.vcpu.get_apic())
    page[SVR : SVR + 4] = (0x1FF).to_bytes(4, "little")
    page[LVT_TIMER : LVT_TIMER + 4] = (TSC_DEADLINE_MODE | 0x40).to_bytes(4, "little")
    state = vm.vcpu.get_state()
    values = {msrs.TSC_DEADLINE: FAR, msrs.MTRR_DEFAULT_TYPE: MTRR_DEFAULT, msrs.MC0_CTL: 0}
    events = bytearray(state[x86.VMSTATE_EVENTS.name]["kvm_vcpu_events"])
    events[13] = 1  # nmi.pending
    state["env.regs"][x86.RAX] = 0x1234567890
    state["env.dr"][0] = 0x4000
    state["env.cr8"] = 3
    vm.vcpu.set_state(
        state
        | {
            "env.tsc": FAR,
            x86.VMSTATE_MSRS.name: {
                "nmsrs": len(values),
                "entries": [{"index": i, "data": value} for i, value in values.items()],
            },
            x86.VMSTATE_EVENTS.name: {"kvm_vcpu_events": bytes(events)},
        }
    )
    vm.accel.set_apic(vm.vcpu, bytes(page))
    vm.accel.set_clock(FAR)
    for number, chip in enumerate(("i8259-0", "i8259-1")):
        vm.accel.set_irqchip(chip, vm.accel.get_irqchip(chip) | {"imr": 0x50 + number})
    ioapic = vm.accel.get_irqchip("ioapic")
    ioapic["ioredtbl"][5] = 0x10045
    vm.accel.set_irqchip("ioapic", ioapic)
    pit = vm.accel.get_irqchip("i8254")
    pit["channels"][2] |= {"count": 777, "mode": 2, "count_load_time": -5000}
    vm.accel.set_irqchip("i8254", pit)
    vm.accel.apply_state()


def whole(vm: TestVm) -> list[Any]:
    chips = [vm.accel.get_irqchip(chip) for chip in CHIPS]
    return [vm.vcpu.get_state(), vm.vcpu.get_apic(), vm.accel.get_clock(), chips]


def hand_over(source: TestVm, target: TestVm) -> None:
    for part in range(2):
        data = source.accel.get_native(part)
        assert len(data) == target.accel.native_size(part)
        target.accel.set_native(part, data)
    target.accel.apply_state()


def test_all_of_a_state_goes_over_and_on(make: Callable[[], TestVm]) -> None:  # noqa: F811
    """The second time from a VM that has been given its state in this way."""
    source, target, last, untouched = make(), make(), make(), make()
    assert source.accel.native_layout() == target.accel.native_layout()
    assert last.accel.native_layout() == target.accel.native_layout()
    for vm in (source, untouched):
        vm.accel.stop_time(0)
    unlike_power_on(source)
    expected = whole(source)
    hand_over(source, target)
    assert whole(target) == expected == whole(source)
    hand_over(target, last)
    assert whole(last) == expected == whole(target)
    for before, after in zip(whole(untouched), expected, strict=True):
        assert before != after


def test_a_part_of_another_size_is_refused(make: Callable[[], TestVm]) -> None:  # noqa: F811
    vm = make()
    vm.accel.native_layout()
    device = NativeState(0)
    device.realize(type("Platform", (), {"accel": vm.accel})())
    size = vm.accel.native_size(0)
    with pytest.raises(ValueError, match=f"field 'size' is {size - 1}"):
        device.check({"size": size - 1, "data": bytes(size - 1)})


@pytest.mark.parametrize("index", [0, 1])
def test_msrs_of_another_layout_are_refused(
    make: Callable[[], TestVm],  # noqa: F811
    index: int,
) -> None:
    source, target = make(), make()
    assert source.accel.native_layout() == target.accel.native_layout()
    data = bytearray(source.accel.get_native(0))
    place = VCPU_SIZE + 16 * index
    data[place : place + 4] = (0x12345678).to_bytes(4, "little")
    target.accel.set_native(0, bytes(data))
    with pytest.raises(ConfigError, match="not those of its layout"):
        target.accel.apply_state()


def test_an_msr_that_this_kvm_does_not_take_is_named(
    make: Callable[[], TestVm],  # noqa: F811
) -> None:
    source, target = make(), make()
    assert source.accel.native_layout() == target.accel.native_layout()
    data = bytearray(source.accel.get_native(0))
    place = data.rindex(msrs.MTRR_DEFAULT_TYPE.to_bytes(8, "little"))  # its index and padding
    data[place + 8 : place + 16] = ((1 << 64) - 1).to_bytes(8, "little")
    target.accel.set_native(0, bytes(data))
    with pytest.raises(KernelError, match=f"MSR {msrs.MTRR_DEFAULT_TYPE:#x} on kvm-vcpu:0"):
        target.accel.apply_state()


def test_a_program_that_does_not_know_it_gets_the_fields(start, guests, tmp_path) -> None:
    """And the guest, which that program does not take, goes on."""
    vm: Vm = start.guest("heartbeat", "kvm")
    keeper = [sys.executable, str(ROOT / "tests" / "releases" / "keeper.py"), str(tmp_path), "run"]
    vm.ask("cpr-exec", command=keeper)
    wait_for(lambda: vm.ask("query-migrate").get("status") == "failed", "the update has failed")
    stream = gzip.decompress((tmp_path / "hand-over.stream.gz").read_bytes())
    assert b"\x03cpu" in stream and b"\x04apic" in stream
    assert b"x-cpr-native" not in stream
    vm.ask("cpr-exec")
    wait_for(lambda: vm.ask("query-migrate").get("status") == "completed", "the next has not")
