"""KVM on the VM's emulated SVM: a guest goes on over an update, as on a host."""

from __future__ import annotations

from harness.vm import HEARTBEAT
from waiting import wait_for_change


def test_a_guest_counts_on_over_an_update(start) -> None:
    vm = start.guest(
        "heartbeat", "kvm", "-m", "64M", "-object", "memory-backend-memfd,id=ram0,size=64M,share=on"
    )
    for _ in range(2):
        before = vm.u32(HEARTBEAT)
        vm.update()
        assert wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on") != before
    assert vm.complaints == ""
