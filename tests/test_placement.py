"""On which CPUs the processes of an update run, and how vCPU threads are scheduled over one."""

from __future__ import annotations

import os

import psutil
import pytest
from failing import own, start_vm, words
from waiting import wait_for

CPUS = sorted(os.sched_getaffinity(0))
several = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: nothing can be kept away from it")


def vcpu_thread(vm) -> int:
    return int(vm.qmp.command("query-cpus-fast")[0]["thread-id"])


def test_a_pinned_vcpu_stays_pinned_over_an_early_update(start, accel):
    vm = start_vm(start, accel)
    os.sched_setaffinity(vcpu_thread(vm), {CPUS[0]})
    vm.update()
    assert os.sched_getaffinity(vcpu_thread(vm)) == {CPUS[0]}
    wait_for(lambda: os.sched_getaffinity(vm.pid) == set(CPUS), "the rest runs where it did")
    assert vm.complaints == ""


@several
def test_the_new_image_starts_away_from_the_vcpu(start, accel):
    vm = start(*words(accel, guest="heartbeat"))  # which does not halt
    os.sched_setaffinity(vcpu_thread(vm), {CPUS[0]})
    hang = ["/bin/sh", "-c", '[ -n "$CPR_LIVE" ] && exec sleep 60; exec "$@"', "sh"]
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=1000)
    vm.qmp.command("cpr-exec", command=[*hang, *own(*words(accel))])
    new = psutil.Process(vm.pid)
    wait_for(lambda: new.name() == "sleep", "the new program hangs")
    assert new.cpu_affinity() == CPUS[1:]
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "failed", "the deadline")
    (old,) = vm.processes()
    wait_for(lambda: os.sched_getaffinity(old) == set(CPUS), "the old image is not kept away")
    assert os.sched_getaffinity(vcpu_thread(vm)) == {CPUS[0]}


@several
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a thread a real-time one")
def test_a_vcpu_that_gives_no_cpu_away_is_updated(start, accel):
    """The old image's thread would have no turn on the CPU of a real-time vCPU that never halts."""
    vm = start(*words(accel, guest="heartbeat"))
    thread = vcpu_thread(vm)
    os.sched_setaffinity(thread, {CPUS[0]})
    os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
    vm.update()
    assert os.sched_getscheduler(vcpu_thread(vm)) == os.SCHED_FIFO
    assert vm.complaints == ""
