"""Late updates whose new program fails: the guest goes on, and so does whoever talks to it."""

from __future__ import annotations

from functools import partial

import pytest
from harness.vm import HEARTBEAT, VMM, Vm
from waiting import wait_for, wait_for_change

DIES = ["/bin/sh", "-c", '[ -n "$CPR_LIVE" ] && kill -9 $$; exec "$@"', "sh"]


def has_failed(vm: Vm, count: int) -> bool:
    return vm.stderr.count("goes on in the old VMM") == count


@pytest.mark.parametrize("program", [DIES, ["/bin/sh", "-c", "exit 3", "sh"]], ids=["dies", "ends"])
def test_a_new_program_that_ends_leaves_guest_and_monitor(start, accel, program):
    """A client is connected, whose socket the exec closes, and the guard takes the next one."""
    vm = start.guest("heartbeat", accel)
    for count in (1, 2):
        stream = f"file:{vm.directory}/stream"
        words = [*program, *VMM, *vm.words[len(VMM) :], "-incoming", stream]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=words)
        vm.qmp.send("migrate", uri=stream)
        wait_for(partial(has_failed, vm, count), "it fails")
        wait_for(lambda: len(vm.processes()) == 1, "one process is left")
        vm.follow()
        vm.qmp.close()
        vm.qmp = vm.connect()
        assert vm.qmp.command("query-migrate")["status"] == "failed"
        assert vm.qmp.command("query-status")["running"]
        wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    assert "Traceback" not in vm.stderr
