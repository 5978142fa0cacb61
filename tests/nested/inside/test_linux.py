"""Linux on KVM, two vCPUs: updates early and late, stop and cont, sleep, power button."""

from __future__ import annotations

from linux_guest import LinuxGuest, linux_image
from waiting import wait_for_change

__all__ = ["linux_image"]

UPDATES = ("early", "late") * 5


def test_a_shell_lives_through_updates(start, linux_image, tmp_path) -> None:
    guest = LinuxGuest(start, tmp_path, "-accel", "kvm", "-smp", "2")
    print(guest.ask("dmesg"))
    assert guest.troubles() == []
    guest.ask("word=kept; clockwatch /tmp/clock & true")
    shell = guest.ask("echo $$")
    for way in UPDATES:
        guest.update(way)
        wait_for_change(lambda: guest.clock()[0], "the process goes on")
    guest.vm.qmp.command("stop")
    guest.vm.qmp.command("cont")
    assert guest.ask("echo $word $$") == f"kept {shell}"
    assert guest.clock()[1] == 0
    print(guest.ask("dmesg | tail -5; cat /sys/devices/system/clocksource/*/current_clocksource"))
    assert guest.troubles() == []
    guest.vm.qmp.command("system_powerdown")
    assert guest.vm.process.wait(60) == 0
    assert guest.vm.complaints == ""
