"""An unmodified Linux kernel boots to a shell; it lives through updates and sleep."""

from __future__ import annotations

import pytest
from conftest import missing_tcg
from linux_guest import LinuxGuest, linux_image
from waiting import wait_for, wait_for_change

__all__ = ["linux_image"]

TICK = 0.02  # s: /proc/uptime has hundredths
UPDATES = ("early", "late") * 5


@pytest.mark.timeout(300)
def test_a_shell_lives_through_updates(start, linux_image, tmp_path) -> None:
    reason = missing_tcg()
    if reason is not None:
        pytest.skip(reason)
    guest = LinuxGuest(start, tmp_path, "-accel", "tcg")
    assert guest.troubles() == []
    guest.ask("word=kept; clockwatch /tmp/clock & true")
    guest.ask("(while sleep 0.1; do echo x; done >/tmp/lines) & true")
    shell = guest.ask("echo $$")

    began, before, _ = guest.uptime()
    for way in UPDATES:
        guest.update(way)
        wait_for_change(lambda: int(guest.ask("wc -l </tmp/lines")), "the process goes on")
        next_began, after, ended = guest.uptime()
        assert before <= after <= before + ended - began + TICK, f"the clock, {way}"
        began, before = next_began, after
    assert guest.ask("echo $word $$") == f"kept {shell}"
    guest.vm.qmp.command("stop")
    guest.vm.qmp.command("cont")

    guest.type("echo mem >/sys/power/state; echo wo''ken")
    wait_for(
        lambda: guest.vm.qmp.command("query-status")["status"] == "suspended", "the guest sleeps"
    )
    guest.vm.qmp.command("system_wakeup")
    guest.read_until("woken\n")
    assert guest.ask("echo $word $$") == f"kept {shell}"

    reads, back, _ = guest.clock()
    assert reads > 0
    assert back == 0
    assert guest.troubles() == []
    guest.vm.qmp.command("system_powerdown")
    assert guest.vm.process.wait(30) == 0
    assert guest.vm.complaints == ""
