"""The state of a KVM VM in this process: the order of its parts, CPUID, and what is in flight."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import missing_kvm
from cpr._native._cpr import lib
from harness.vm import Vm
from waiting import wait_for

from cpr import vcpus
from cpr.accel import x86
from cpr.accel.kvm import KvmAccelerator, cpuid, msrs
from cpr.accel.kvm import state as steps
from cpr.accel.kvm.cpuid import cpuid_missing
from cpr.bus import IOBus
from cpr.devices.system import VCpuState
from cpr.errors import ConfigError, KernelError
from cpr.memory import GuestMemory
from cpr.ram_backend import create_default_block
from cpr.state.fds import PreservedFds
from cpr.state.reader import BytesReader
from cpr.uapi import kvm
from cpr.vcpus import VCpuThread, _semaphore

needs_kvm = pytest.mark.skipif(missing_kvm() is not None, reason=str(missing_kvm()))

RAM_SIZE = 1 << 20
CODE, HANDLER, STACK, COUNTER, SEEN = 0x1000, 0x1100, 0x7000, 0x8000, 0x8004
VECTOR, NMI_VECTOR = 0x40, 2
SVR, IRR, LVT_TIMER = 0xF0, 0x200, 0x320
TSC_DEADLINE_MODE = 2 << 17
STI_SHADOW = 1  # KVM_X86_SHADOW_INT_STI is 2, of MOV SS 1: both hold an interrupt back
FAR = 1 << 40
MTRR_DEFAULT = 0xC06
WALL_CLOCK = 0x6000

# inc dword [COUNTER]; hlt; jmp to the hlt
COUNT_ONE = bytes.fromhex("66 ff 06 00 80  f4  eb fd")
# mov eax, [COUNTER]; inc eax; mov [SEEN], eax; hlt: SEEN is one more than the counter was
NOTE = bytes.fromhex("66 a1 00 80  66 40  66 a3 04 80  f4")


class TestVm:
    """A VM of one vCPU in real mode, with RAM of its own."""

    __test__ = False

    def __init__(self) -> None:
        self.accel = KvmAccelerator()
        self.ram = create_default_block("ram", RAM_SIZE, PreservedFds())
        self.accel.map_ram(0, RAM_SIZE, self.ram.host)
        self.accel.create_irqchip()
        self.vcpu = self.accel.create_vcpu(0)
        self.ram.write(CODE, COUNT_ONE)
        self.ram.write(HANDLER, NOTE)
        self.ram.write(0, (HANDLER.to_bytes(2, "little") + bytes(2)) * 256)
        self.thread = VCpuThread(self.vcpu, IOBus(_semaphore()), print, print)
        self.vcpu.set_state(real_mode())
        self.accel.apply_state()

    def word(self, address: int) -> int:
        return int.from_bytes(self.ram.view(address, 4), "little")

    def close(self) -> None:
        self.thread.end()
        self.vcpu.close()
        self.accel.close()
        self.ram.close()


def real_mode() -> dict:
    state = x86.reset_state(0)
    state["env.segs"] = [x86.real_mode_segment(0) for _ in range(6)]
    state["env.segs"][x86.CS]["flags"] |= 8 << x86.FLAG_TYPE_SHIFT
    state["env.idt"] = x86.segment(0, 0, 0x3FF)
    state["env.eip"] = CODE
    state["env.regs"][x86.RSP] = STACK
    return state


@pytest.fixture
def make() -> Iterator[Callable[[], TestVm]]:
    vms: list[TestVm] = []

    def make_one() -> TestVm:
        vms.append(TestVm())
        return vms[-1]

    yield make_one
    for vm in vms:
        vm.close()


def through_stream(state: dict) -> dict:
    """As a section of the stream has it."""
    vmstate = x86.VMSTATE_CPU
    return vmstate.decode(BytesReader(vmstate.encode(state)), vmstate.version_id)


def test_order_of_the_table() -> None:
    """Each pair is one reason that a row gives."""
    names = [step.name for step in steps.VCPU_STEPS]
    pairs = [
        *(("cpuid", name) for name in names[1:]),
        ("regs", "sregs"),
        ("sregs", "lapic"),
        ("lapic", "msrs"),
        ("regs", "events"),
        ("debug", "events"),
        *((name, "mp_state") for name in names[:-1]),
    ]
    for first, second in pairs:
        assert names.index(first) < names.index(second)
    assert [step.name for step in steps.TIME_STEPS] == [
        "clock",
        "tsc",
        "deadline",
        "stopped",
        "i8254",
    ]
    assert [name for name, _ in steps.CHIP_STEPS][-1] == "ioapic"
    reasons = [step.why for step in steps.VCPU_STEPS] + [step.why for step in steps.TIME_STEPS]
    assert all(len(why) > 5 for why in reasons)


def leaf(function: int, index: int = 0, **registers: int) -> tuple[int, ...]:
    values = {"eax": 0, "ebx": 0, "ecx": 0, "edx": 0} | registers
    return (function, index, 0, *values.values())


def test_missing_features_are_named() -> None:
    wanted = [
        leaf(1, ecx=1 << 24 | 1 << 16, edx=1),
        leaf(7, 1, eax=1 << 4),
        leaf(0x80000007, edx=256),
    ]
    assert cpuid_missing(wanted, [leaf(1, edx=1)]) == [
        "leaf 0x1 ecx bit 16",
        "leaf 0x1 ecx bit 24 (tsc-deadline)",
        "leaf 0x7.1 eax bit 4 (avx-vnni)",
        "leaf 0x80000007 edx bit 8 (invtsc)",
    ]
    assert cpuid_missing(wanted, wanted) == []


def test_a_host_that_offers_more_lacks_nothing() -> None:
    wanted = [leaf(1, ecx=1 << 24, ebx=5 << 24)]
    assert cpuid_missing(wanted, [leaf(1, ecx=0xFFFFFFFF), leaf(7, ebx=1)]) == []
    assert cpuid_missing([leaf(1, ecx=1 << 27)], [leaf(1)]) == [], "OSXSAVE is CR4's"
    assert cpuid_missing([leaf(0x80000002, eax=1)], []) == [], "the brand is no feature"


def with_bit(model: cpuid.Cpuid, bit: int, on: bool) -> cpuid.Cpuid:
    """The model with a bit of leaf 1's ECX set or clear."""
    return tuple(
        (*e[:5], e[5] | 1 << bit if on else e[5] & ~(1 << bit), e[6]) if e[0] == 1 else e
        for e in model
    )


@needs_kvm
def test_model_is_plain_data_and_is_compared(make: Callable[[], TestVm]) -> None:
    accel = make().accel
    model = json.loads(json.dumps(accel.cpu_model()))
    accel.check_cpu_model(model)
    accel.check_cpu_model({})
    model["cpuid"] = [list(entry) for entry in with_bit(accel.supported_cpuid(), 16, True)]
    with pytest.raises(ConfigError, match=r"it lacks leaf 0x1 ecx bit 16$"):
        accel.check_cpu_model(model)


def test_a_new_guest_has_no_feature_whose_state_is_not_saved() -> None:
    host = [leaf(1, ecx=1 << 5 | 1), leaf(7, ecx=1 << 7 | 1), leaf(0x80000001, ecx=1 << 2 | 1)]
    offered = cpuid.offered_to_guests(tuple(tuple(entry) for entry in host))
    assert [entry[cpuid.ECX] for entry in offered] == [1, 1, 1]
    assert [entry[: cpuid.ECX] for entry in offered] == [tuple(e[: cpuid.ECX]) for e in host]
    cpuid.check(offered, tuple(tuple(entry) for entry in host))


@needs_kvm
@pytest.mark.parametrize("enabled", [False, True])
def test_steal_time_does_not_go_back_with_a_new_thread(
    make: Callable[[], TestVm], monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    """KVM counts by the thread, and takes from the guest what the last one had waited."""
    vm = make()
    address = RAM_SIZE // 2
    memory = GuestMemory()
    memory.add_section(0, RAM_SIZE, vm.ram, 0, False, "ram")
    told = 5_000_000_000
    vm.ram.write(address, told.to_bytes(8, "little"))
    msr = (lib.MSR_KVM_STEAL_TIME, address | lib.KVM_MSR_ENABLED * enabled)
    assert kvm.set_msrs(vm.vcpu.fd, [msr]) == []
    monkeypatch.setattr(vcpus, "schedstat", lambda thread_id: (1, 700_000_000))
    vm.thread.end()
    assert vm.thread.waited_ns == 700_000_000
    vm.vcpu.on_new_thread(vm.thread.waited_ns, memory)
    vm.thread.start()
    expected = told + 700_000_000 * enabled
    assert int.from_bytes(vm.ram.view(address, 8), "little") == expected


@needs_kvm
def test_a_loaded_guest_keeps_its_own_cpuid(make: Callable[[], TestVm]) -> None:
    source, target = make(), make()
    source.vcpu.cpuid = with_bit(source.vcpu.cpuid, 12, False)  # fma
    cpuid.write(source.vcpu.fd, source.vcpu.cpuid)
    state = through_stream(source.vcpu.get_state())
    VCpuState(target.vcpu).check(state)
    target.vcpu.set_state(state)
    target.accel.apply_state()
    assert target.vcpu.cpuid == source.vcpu.cpuid
    assert target.accel.cpu_model() == source.accel.cpu_model()


@needs_kvm
def test_a_state_without_cpuid_is_loaded(make: Callable[[], TestVm]) -> None:
    source, target = make(), make()
    state = source.vcpu.get_state()
    del state[x86.VMSTATE_CPUID.name]
    own = target.vcpu.cpuid
    VCpuState(target.vcpu).check(through_stream(state))
    target.vcpu.set_state(through_stream(state))
    target.accel.apply_state()
    assert target.vcpu.cpuid == own


@needs_kvm
def test_a_stream_for_another_processor_is_refused(start, tmp_path) -> None:
    words = [*("-nodefaults", "-display", "none", "-accel", "kvm", "-m", "16M")]
    words += ["-drive", "file=examples/build/halt.img,format=raw,if=floppy"]
    source: Vm = start(*words, "-S")
    path = tmp_path / "state"
    source.qmp.command("migrate", uri=f"file:{path}")
    wait_for(lambda: source.qmp.command("query-migrate")["status"] == "completed", "it is saved")
    data = bytearray(path.read_bytes())
    first = data.index(b"cpu/cpuid") + len(b"cpu/cpuid") + 8  # its version, and nent
    entry = next(at for at in range(first, len(data), 28) if data[at : at + 4] == b"\0\0\0\1")
    ecx = entry + 20
    data[ecx + 1] |= 1  # bit 16, which no processor has
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"VMM ended with 1(.|\n)*leaf 0x1 ecx bit 16\n"):
        start(*words, "-incoming", f"file:{path}")


@needs_kvm
def test_interrupt_waits_for_the_instruction_after_sti(make: Callable[[], TestVm]) -> None:
    source, target = make(), make()
    state = source.vcpu.get_state() | {"env.eflags": 0x202, "env.interrupt_shadow": STI_SHADOW}
    page = bytearray(source.vcpu.get_apic())
    page[SVR : SVR + 4] = (0x1FF).to_bytes(4, "little")
    irr = IRR + VECTOR // 32 * 16
    page[irr : irr + 4] = (1 << VECTOR % 32).to_bytes(4, "little")
    source.accel.set_apic(source.vcpu, bytes(page))
    source.vcpu.set_state(state)
    state = through_stream(source.vcpu.get_state())
    assert state["env.interrupt_shadow"]
    target.vcpu.set_state(state)
    target.accel.set_apic(target.vcpu, source.vcpu.get_apic())
    assert target.vcpu.get_state()["env.interrupt_shadow"] == state["env.interrupt_shadow"]
    target.thread.resume()
    wait_for(lambda: target.word(SEEN) != 0, "the interrupt")
    assert target.word(SEEN) == 2, "one instruction, and then the interrupt"


@needs_kvm
def test_nmi_that_waits_is_taken_once(make: Callable[[], TestVm]) -> None:
    source, target = make(), make()
    state = source.vcpu.get_state()
    events = bytearray(state[x86.VMSTATE_EVENTS.name]["kvm_vcpu_events"])
    events[13] = 1  # nmi.pending
    state[x86.VMSTATE_EVENTS.name] = {"kvm_vcpu_events": bytes(events)}
    source.vcpu.set_state(state)
    target.vcpu.set_state(through_stream(source.vcpu.get_state()))
    target.accel.apply_state()
    target.thread.resume()
    wait_for(lambda: target.word(SEEN) != 0, "the NMI")


@needs_kvm
@pytest.mark.parametrize("apic_first", [True, False])
def test_tsc_deadline_is_set_whatever_comes_first(
    make: Callable[[], TestVm], apic_first: bool
) -> None:
    vm = make()
    page = bytearray(vm.vcpu.get_apic())
    page[SVR : SVR + 4] = (0x1FF).to_bytes(4, "little")
    page[LVT_TIMER : LVT_TIMER + 4] = (TSC_DEADLINE_MODE | VECTOR).to_bytes(4, "little")
    state = vm.vcpu.get_state()
    state[x86.VMSTATE_MSRS.name] = {
        "nmsrs": 1,
        "entries": [{"index": msrs.TSC_DEADLINE, "data": FAR}],
    }
    if apic_first:
        vm.accel.set_apic(vm.vcpu, bytes(page))
    vm.vcpu.set_state(state)
    if not apic_first:
        vm.accel.set_apic(vm.vcpu, bytes(page))
    vm.accel.apply_state()
    assert saved_msrs(vm)[msrs.TSC_DEADLINE] == FAR, "kept until it runs"
    vm.accel.start_time(time.monotonic_ns())
    assert kvm.get_msrs(vm.vcpu.fd, [msrs.TSC_DEADLINE]) == {msrs.TSC_DEADLINE: FAR}
    assert saved_msrs(vm)[msrs.TSC_DEADLINE] == FAR


def saved_msrs(vm: TestVm) -> dict[int, int]:
    entries = vm.vcpu.get_state()[x86.VMSTATE_MSRS.name]["entries"]
    return {entry["index"]: entry["data"] for entry in entries}


@needs_kvm
def test_time_stands_still_and_goes_on_together(make: Callable[[], TestVm]) -> None:
    """Holds too with a KVM that gives guests the host's TSC, whatever is written."""
    source, target = make(), make()
    source.vcpu.set_state(source.vcpu.get_state() | {"env.tsc": FAR})
    source.accel.set_clock(FAR)
    source.accel.start_time(time.monotonic_ns())
    source.accel.stop_time(time.monotonic_ns())
    state, clock = source.vcpu.get_state(), source.accel.get_clock()
    assert state["env.tsc"] > FAR < clock
    assert source.vcpu.get_state()["env.tsc"] == state["env.tsc"]
    assert source.accel.get_clock() == clock
    target.vcpu.set_state(through_stream(state))
    target.accel.set_clock(clock)
    target.accel.apply_state()
    assert target.vcpu.get_state()["env.tsc"] == state["env.tsc"]
    assert target.accel.get_clock() == clock
    target.accel.start_time(time.monotonic_ns())
    ticks = msrs.read_tsc(target.vcpu) - state["env.tsc"]
    ns = target.accel.get_clock() - clock
    assert ticks > 0
    assert abs(ticks * 1_000_000 // state["env.tsc_khz"] - ns) < 500_000_000


@needs_kvm
def test_reset_puts_msrs_and_events_back(make: Callable[[], TestVm]) -> None:
    vm = make()
    at_power_on = saved_msrs(vm)
    state = vm.vcpu.get_state()
    changed = {msrs.MTRR_DEFAULT_TYPE: MTRR_DEFAULT, msrs.MC0_CTL: 0, 0x277: 0x0606060606060606}
    entries = [{"index": index, "data": value} for index, value in changed.items()]
    events = bytearray(state[x86.VMSTATE_EVENTS.name]["kvm_vcpu_events"])
    events[13] = 1
    vm.vcpu.set_state(
        state
        | {
            x86.VMSTATE_MSRS.name: {"nmsrs": len(entries), "entries": entries},
            x86.VMSTATE_EVENTS.name: {"kvm_vcpu_events": bytes(events)},
        }
    )
    assert changed.items() <= saved_msrs(vm).items()
    VCpuState(vm.vcpu).reset()
    assert saved_msrs(vm) == at_power_on
    assert vm.vcpu.get_state()[x86.VMSTATE_EVENTS.name]["kvm_vcpu_events"][13] == 0


@needs_kvm
@pytest.mark.parametrize("index", [0x11, 0x4B564D00])
def test_loading_a_guest_that_has_set_its_wall_clock_writes_no_ram(
    make: Callable[[], TestVm], index: int
) -> None:
    """Where it is belongs to no state; one of an earlier version has it."""
    source, target = make(), make()
    before = bytes(target.ram.view(0, RAM_SIZE))
    assert kvm.set_msrs(source.vcpu.fd, [(index, WALL_CLOCK)]) == []
    assert any(source.ram.view(WALL_CLOCK, 12))
    state = source.vcpu.get_state()
    entries = [*state[x86.VMSTATE_MSRS.name]["entries"], {"index": index, "data": WALL_CLOCK}]
    state[x86.VMSTATE_MSRS.name] = {"nmsrs": len(entries), "entries": entries}
    target.vcpu.set_state(through_stream(state))
    target.accel.apply_state()
    assert bytes(target.ram.view(0, RAM_SIZE)) == before
    assert source.accel.native_layout() == target.accel.native_layout()
    for part in range(2):
        target.accel.set_native(part, source.accel.get_native(part))
    target.accel.apply_state()
    assert bytes(target.ram.view(0, RAM_SIZE)) == before
    assert index not in saved_msrs(source)


@needs_kvm
def test_an_msr_that_would_be_lost_is_an_error(make: Callable[[], TestVm]) -> None:
    vm = make()
    entries = [{"index": 0x12345678, "data": 1}, {"index": 0x12345679, "data": 0}]
    state = vm.vcpu.get_state()
    vm.vcpu.set_state(state | {x86.VMSTATE_MSRS.name: {"nmsrs": 2, "entries": entries}})
    with pytest.raises(KernelError, match="MSR 0x12345678 on kvm-vcpu:0"):
        vm.accel.apply_state()
