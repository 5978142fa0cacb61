"""Linux on KVM, two vCPUs: updates early and late, stop and cont, power button.

The vCPUs of the emulated SVM are slow, and its XSETBV does not reach KVM: what the kernel says
while it boots is left aside, and that its timer interrupts take long, which it says without any
update too; XSAVE is not used.
"""

from __future__ import annotations

from linux_guest import LinuxGuest, linux_image
from waiting import wait_for_change

__all__ = ["linux_image"]

SECONDS = 300.0
UPDATES = ("early", "late") * 5
COMMAND_LINE = "console=ttyS0 panic=-1 mitigations=off nokaslr quiet noxsave"


def troubles(guest: LinuxGuest) -> list[str]:
    """Those of the guest's log that do not come without updates too."""
    return [line for line in guest.troubles() if "interrupt took" not in line]


def test_a_shell_lives_through_updates(start, linux_image, tmp_path) -> None:
    guest = LinuxGuest(
        start, tmp_path, "-accel", "kvm", "-smp", "2", "-append", COMMAND_LINE, seconds=SECONDS
    )
    assert "tsc" in guest.ask("dmesg -c")
    guest.ask("word=kept; clockwatch /tmp/clock & true")
    shell = guest.ask("echo $$")
    for way in UPDATES:
        guest.update(way)
        wait_for_change(lambda: guest.clock()[0], "the process goes on")
    guest.vm.qmp.command("stop")
    guest.vm.qmp.command("cont")
    wait_for_change(lambda: guest.clock()[0], "the process goes on")
    assert guest.ask("echo $word $$") == f"kept {shell}"
    assert guest.clock()[1] == 0
    assert troubles(guest) == [], guest.ask("dmesg")
    guest.vm.qmp.command("system_powerdown")
    assert guest.vm.process.wait(60) == 0
    assert guest.vm.complaints == ""
