"""A guest that sleeps in ACPI S3 stays asleep over an update, and wakes up after it."""

from __future__ import annotations

from harness.vm import HEARTBEAT
from waiting import wait_for, wait_for_change

# On the first boot it marks 0x600 and goes to sleep; when it wakes up, it counts at 0x8000.
GUEST = bytes.fromhex(
    "803e000600"  # cmp byte [0x600], 0
    "750c"  # jne 1f
    "c606000601"  # mov byte [0x600], 1
    "ba0406"  # mov dx, 0x604
    "b80024"  # mov ax, 0x2400
    "ef"  # out dx, ax
    "66ff060080"  # 1: inc dword [0x8000]
    "ebf9"  # jmp 1b
)


def test_asleep_before_and_after_and_awake_again(start, accel, tmp_path):
    image = tmp_path / "sleeper.img"
    image.write_bytes(GUEST.ljust(510, b"\0") + b"\x55\xaa")
    vm = start(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "16M"),
        *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", f"file={image},format=raw,if=floppy"),
    )
    asleep = {"status": "suspended", "running": False}
    wait_for(lambda: vm.qmp.command("query-status") == asleep, "the guest sleeps")
    assert [event["event"] for event in vm.qmp.events] in ([], ["SUSPEND"])
    stands = vm.u32(HEARTBEAT)
    vm.update()
    assert vm.qmp.command("query-status") == asleep
    vm.qmp.command("stop")
    assert vm.qmp.command("query-status")["status"] == "paused"
    vm.update()
    assert vm.qmp.command("query-status")["status"] == "paused"
    vm.qmp.command("cont")
    assert vm.qmp.command("query-status") == asleep
    assert vm.u32(HEARTBEAT) == stands
    vm.qmp.command("system_wakeup")
    assert vm.qmp.command("query-status")["running"]
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
