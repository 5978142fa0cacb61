"""Interrupts by eventfd on the real KVM: into a guest that counts them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from conftest import missing_kvm
from descriptors import open_fds
from waiting import wait_for

from cpr.accel import x86
from cpr.accel.kvm import KvmAccelerator
from cpr.accel.kvm.interrupts import drain
from cpr.bus import IOBus
from cpr.errors import KernelError
from cpr.ram import RAMBlock
from cpr.ram_backend import create_default_block
from cpr.state.fds import PreservedFds
from cpr.vcpus import VCpuThread, _semaphore

pytestmark = pytest.mark.skipif(missing_kvm() is not None, reason=str(missing_kvm()))

RAM_SIZE = 1 << 20
CODE, HANDLER, STACK, COUNTER = 0x1000, 0x1100, 0x7000, 0x8000
VECTOR, OTHER_VECTOR = 0x40, 0x41
LEVEL_VECTOR, LEVEL_PIN = 0x42, 11
MSI = 0xFEE00000
SVR = 0xF0
WAIT = bytes.fromhex("fb f4 eb fc")  # sti; hlt; again
# inc dword [COUNTER]; mov dword [0xfee000b0], 0 (EOI); iret
COUNT = bytes.fromhex("66 ff 06 00 80  67 66 c7 05 b0 00 e0 fe 00 00 00 00  cf")


class CountingVm:
    """A real-mode guest on one vCPU that halts, and counts the interrupts of every vector."""

    def __init__(self) -> None:
        self.accel = KvmAccelerator()
        self.ram: RAMBlock = create_default_block("ram", RAM_SIZE, PreservedFds())
        self.accel.map_ram(0, RAM_SIZE, self.ram.host)
        self.accel.create_irqchip()
        self.vcpu = self.accel.create_vcpu(0)
        self._write(CODE, WAIT)
        self._write(HANDLER, COUNT)
        self._write(0, (HANDLER.to_bytes(2, "little") + bytes(2)) * 256)
        self.vcpu.set_state(flat_state())
        apic = bytearray(self.accel.get_apic(self.vcpu))
        apic[SVR : SVR + 4] = (0x1FF).to_bytes(4, "little")
        self.accel.set_apic(self.vcpu, bytes(apic))
        for chip in ("i8259-0", "i8259-1"):  # GSI 11 is theirs too
            self.accel.set_irqchip(chip, self.accel.get_irqchip(chip) | {"imr": 0xFF})
        self.accel.apply_state()
        self.eventfds: list[int] = []
        self.thread = VCpuThread(self.vcpu, IOBus(_semaphore()), print, print)

    def _write(self, address: int, data: bytes) -> None:
        self.ram.write(address, data)

    @property
    def count(self) -> int:
        return int.from_bytes(self.ram.view(COUNTER, 4), "little")

    def expect(self, count: int) -> None:
        """Exactly so many have come, and no more come."""
        wait_for(lambda: self.count >= count, f"{count} interrupts")
        for _ in range(20):
            self.thread.run_on(lambda vcpu: None)
        assert self.count == count

    def eventfd(self) -> int:
        self.eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self.eventfds[-1]

    def close(self) -> None:
        self.thread.end()
        self.vcpu.close()
        self.accel.close()
        self.ram.close()
        for fd in self.eventfds:
            os.close(fd)


def flat_state() -> dict:
    """Real mode, with data segments that reach the local APIC."""
    state = x86.reset_state(0)
    present = x86.FLAG_P | x86.FLAG_S
    data = x86.segment(0, 0, 0xFFFFFFFF, present | x86.FLAG_G | 3 << x86.FLAG_TYPE_SHIFT)
    code = x86.segment(0, 0, 0xFFFF, present | 0xB << x86.FLAG_TYPE_SHIFT)
    state["env.segs"] = [dict(data), code, dict(data), dict(data), dict(data), dict(data)]
    state["env.idt"] = x86.segment(0, 0, 0x3FF)
    state["env.eip"] = CODE
    state["env.regs"][4] = STACK
    return state


@pytest.fixture
def vm() -> Iterator[CountingVm]:
    vm = CountingVm()
    vm.accel.check_irqfds()
    yield vm
    vm.close()


def test_message_by_irqfd(vm: CountingVm) -> None:
    fd = vm.eventfd()
    (gsi,) = vm.accel.add_messages([(MSI, VECTOR)])
    assert gsi >= 24
    vm.accel.add_irqfd(gsi, fd)
    vm.thread.resume()
    for count in range(1, 6):
        os.eventfd_write(fd, 1)
        vm.expect(count)
    assert drain(fd) == 0, "KVM takes it"


def test_what_came_while_nobody_listened_comes_once(vm: CountingVm) -> None:
    fd = vm.eventfd()
    (gsi,) = vm.accel.add_messages([(MSI, VECTOR)])
    vm.thread.resume()
    count = 0
    for came in (0, 1, 3, 0, 0, 1):
        for _ in range(came):
            os.eventfd_write(fd, 1)
        vm.accel.add_irqfd(gsi, fd)
        count += came > 0
        vm.expect(count)
        vm.accel.remove_irqfd(gsi, fd)


def test_routes_are_changed_and_given_back(vm: CountingVm) -> None:
    first, second = vm.eventfd(), vm.eventfd()
    gsis = vm.accel.add_messages([(MSI, VECTOR), (MSI, OTHER_VECTOR)])
    for gsi, fd in zip(gsis, (first, second), strict=True):
        vm.accel.add_irqfd(gsi, fd)
    vm.thread.resume()
    vm.accel.set_message(gsis[0], MSI | 1 << 12, VECTOR)  # to an APIC that is not there
    os.eventfd_write(first, 1)
    vm.expect(0)
    os.eventfd_write(second, 1)
    vm.expect(1)
    vm.accel.remove_irqfd(gsis[0], first)
    vm.accel.remove_message(gsis[0])
    assert vm.accel.add_messages([(MSI, VECTOR)]) == [gsis[0]]
    vm.accel.signal_message(MSI, VECTOR)
    vm.expect(2)


def test_refused_route_leaves_the_others(vm: CountingVm, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = vm.eventfd()
    (gsi,) = vm.accel.add_messages([(MSI, VECTOR)])
    vm.accel.add_irqfd(gsi, fd)
    with pytest.raises(KernelError, match="KVM_SET_GSI_ROUTING"):
        vm.accel.add_messages([(MSI, VECTOR)] * 5000)  # KVM has 4096
    assert vm.accel.add_messages([(MSI, OTHER_VECTOR)]) == [gsi + 1]
    vm.thread.resume()
    os.eventfd_write(fd, 1)
    vm.expect(1)


def test_level_interrupt_is_resampled(vm: CountingVm) -> None:
    """The end of the interrupt writes the second eventfd, and the line goes down until then."""
    up, ended = vm.eventfd(), vm.eventfd()
    vm.accel.add_messages([(MSI, VECTOR)])  # the chips' wiring is kept beside messages
    ioapic = vm.accel.get_irqchip("ioapic")
    ioapic["ioredtbl"][LEVEL_PIN] = 1 << 15 | LEVEL_VECTOR
    vm.accel.set_irqchip("ioapic", ioapic)
    vm.accel.apply_state()
    vm.accel.add_irqfd(LEVEL_PIN, up, ended)
    vm.thread.resume()
    for count in range(1, 4):
        os.eventfd_write(up, 1)
        vm.expect(count)
        wait_for(lambda: drain(ended) == 1, "the interrupt is ended")


def test_kvm_vfio_device_goes_with_its_last_file(vm: CountingVm) -> None:
    before = len(open_fds())
    with open("/dev/null") as file, pytest.raises(KernelError, match="KVM_DEV_VFIO_FILE_ADD"):
        vm.accel.add_vfio_file(file.fileno())  # no VFIO file
    vm.accel.remove_vfio_file(0)
    assert len(open_fds()) <= before + 1


def test_what_an_eventfd_has_counted_survives_an_irqfd_that_fails(vm: CountingVm) -> None:
    fd = vm.eventfd()
    no_eventfd = os.open("/dev/null", os.O_RDWR)
    os.eventfd_write(fd, 1)
    with pytest.raises(KernelError):
        vm.accel.add_irqfd(LEVEL_PIN, fd, no_eventfd)
    os.close(no_eventfd)
    assert os.eventfd_read(fd) == 1
