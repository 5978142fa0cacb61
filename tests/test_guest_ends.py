"""How a guest ends or resets: the events, the exit status, -no-reboot and -no-shutdown."""

from __future__ import annotations

import pytest
from waiting import wait_for

BOOTS = 0x600
RESETS = ["reset-i8042", "reset-port92", "triplefault"]
PLAIN = (
    *("-nodefaults", "-display", "none", "-m", "16M"),
    *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
    *("-machine", "pc,memory-backend=ram0,aux-ram-share=on", "-S"),
)


def boot(start, accel, guest, *arguments):
    """A paused VM with `guest` in its floppy drive."""
    drive = f"file=examples/build/{guest}.img,format=raw,if=floppy"
    return start("-accel", accel, *PLAIN, "-drive", drive, *arguments)


def events_to_the_end(vm):
    vm.qmp.wait_closed()
    return [(event["event"], event.get("data")) for event in vm.qmp.events]


@pytest.mark.parametrize("guest", RESETS)
def test_reset_boots_again(start, accel, guest):
    vm = boot(start, accel, guest)
    vm.qmp.command("cont")
    wait_for(lambda: vm.u32(BOOTS) == 2, "the second boot")
    vm.qmp.command("query-status")
    reset = [event for event in vm.qmp.events if event["event"] == "RESET"]
    assert [event["data"] for event in reset] == [{"guest": True, "reason": "guest-reset"}]


@pytest.mark.parametrize("guest", RESETS)
def test_no_reboot_ends_instead(start, accel, guest):
    vm = boot(start, accel, guest, "-no-reboot")
    vm.qmp.send("cont")
    assert ("SHUTDOWN", {"guest": True, "reason": "guest-reset"}) in events_to_the_end(vm)
    assert vm.process.wait(10) == 0


def test_debug_exit_status(start, accel):
    device = ("-device", "isa-debug-exit,iobase=0x501,iosize=2")
    vm = boot(start, accel, "exit", *device)
    vm.qmp.send("cont")
    assert vm.process.wait(10) == 33


def test_quit(start, accel):
    vm = boot(start, accel, "heartbeat")
    vm.qmp.command("quit")
    assert events_to_the_end(vm) == [
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}),
    ]
    assert vm.process.wait(10) == 0


def test_system_reset_boots_a_paused_guest_again(start, accel):
    vm = boot(start, accel, "heartbeat")
    vm.qmp.command("system_reset")
    wait_for(
        lambda: (
            vm.qmp.command("query-status")
            and [event for event in vm.qmp.events if event["event"] == "RESET"]
        ),
        "the reset",
    )
    vm.qmp.command("cont")
    wait_for(lambda: vm.u32(0x8000) > 0, "the guest counts")


def test_debugcon_reaches_its_chardev(start, accel, tmp_path):
    log = tmp_path / "debug.log"
    chardev = ("-chardev", f"file,id=debug,path={log}")
    device = ("-device", "isa-debugcon,iobase=0xe9,chardev=debug")
    vm = boot(start, accel, "debugcon", *chardev, *device)
    vm.qmp.command("cont")
    wait_for(lambda: log.read_text().endswith("\n"), "the guest's greeting")


@pytest.mark.parametrize("guest", RESETS)
def test_a_reset_asked_for_during_an_update_is_not_lost(start, accel, guest):
    vm = boot(start, accel, guest)
    vm.qmp.send("cont")
    vm.qmp.send("cpr-exec")
    for _ in range(2):
        vm.qmp.read_reply()
    vm.reconnect()
    wait_for(lambda: vm.u32(BOOTS) == 2, "the second boot")
