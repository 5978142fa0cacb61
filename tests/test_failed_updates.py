"""Updates to programs that fail, early and late: the guest goes on, and nothing is left over."""

from __future__ import annotations

import os
from itertools import cycle

import psutil
import pytest
from failing import Failing, bad, programs, protocol_programs, start_vm
from harness.vm import Vm
from waiting import wait_for

NAMES = [
    "false",
    "killed",
    "hang",
    "missing",
    "interpreter",
    "no-exec",
    "import",
    "bad-option",
    "ram-size",
    "fewer-cpus",
]


@pytest.mark.parametrize("late", [False, True], ids=["cpr-exec", "migrate"])
@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_fails(start, accel, tmp_path, name, late):
    command, text, same_pid = programs(tmp_path, accel)[name]
    failing = Failing(start_vm(start, accel))
    failing.update(command, late, tmp_path / "state")
    failing.check(text, same_pid)
    failing.update_well()


def goes_first(vm: Vm) -> None:
    """An exec of this VM, and what it executes, comes before its guard on the one CPU there is."""
    for thread in psutil.Process(vm.pid).threads():
        os.sched_setaffinity(thread.id, {min(os.sched_getaffinity(0))})
    try:
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(vm.pid, policy, os.sched_param(1))
    except PermissionError as error:
        pytest.skip(f"SCHED_FIFO: {error.strerror}")


def test_a_program_that_is_dead_before_the_guard_looks(start, accel, tmp_path):
    failing = Failing(start_vm(start, accel))
    goes_first(failing.vm)
    failing.update(bad("exit"), False, tmp_path / "state")
    failing.check("exit status 1", False)


def test_a_signal_that_ends_the_new_image_before_the_guard_looks(start, accel, tmp_path):
    vm = start_vm(start, accel)
    goes_first(vm)
    dies = ["/bin/sh", "-c", '[ -n "$CPR_LIVE" ] && kill $$; exec "$@"', "sh"]
    vm.qmp.command("cpr-exec", command=[*dies, *vm.words])
    wait_for(lambda: vm.complaints and not vm.processes(), "the VM ends")
    assert vm.complaints == "cpr-vmm: terminating on signal 15\n"


# The accelerators have no part in it: one after the other.
@pytest.mark.parametrize(
    ("kind", "accel"), list(zip(protocol_programs(), cycle(["kvm", "tcg"]))), indirect=["accel"]
)
def test_a_program_that_breaks_the_protocol(start, accel, tmp_path, kind):
    command, text, same_pid = protocol_programs()[kind]
    failing = Failing(start_vm(start, accel))
    failing.update(command, False, tmp_path / "state")
    failing.check(text, same_pid)
    failing.update_well()


@pytest.mark.parametrize("how", ["early", "late", "rehearsal", "refusal"])
def test_what_a_program_has_forked_ends_with_it(start, how, tmp_path):
    """It has the guest's RAM and disks, and the locks on them."""
    vm = start_vm(start, "tcg")
    failing = Failing(vm)
    kind = {"late": "fork-first", "refusal": "fork-refuse"}.get(how, "fork")
    command = [*bad(kind), str(tmp_path), "run"]
    if how == "rehearsal":
        assert vm.qmp.command("cpr-exec", test=True, command=command)["refusals"]
    else:
        failing.update(command, how == "late", tmp_path / "state")
        failing.check("exit status 1|it has a child", how == "refusal")
    words = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
    assert not [line for line in words if str(tmp_path) in line]
