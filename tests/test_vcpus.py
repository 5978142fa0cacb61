"""vCPU threads: who looks at a vCPU meets no one who pauses and resumes it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from waiting import wait_for

from cpr import runstate, vcpus
from cpr.accel import base
from cpr.errors import CommandError
from cpr.lifecycle import Lifecycle
from cpr.vcpus import Scheduling, VCpuThread

ROUNDS = 300


class VCpu:
    """One that is in the guest until it is kicked; `inside` while it is."""

    index = 0

    def __init__(self) -> None:
        self.inside = False
        self._kicked = threading.Event()

    def run(self, bus: Any) -> str:
        self.inside = True
        self._kicked.wait()
        self._kicked.clear()
        self.inside = False
        return base.KICKED

    def kick(self) -> None:
        self._kicked.set()


@pytest.fixture
def thread() -> Iterator[VCpuThread]:
    vcpu: Any = VCpu()
    bus: Any = None
    made = VCpuThread(vcpu, bus, lambda: None, lambda error: None)
    yield made
    made.end()


def test_a_vcpu_is_looked_at_while_another_thread_pauses_and_resumes_it(thread):
    """As `info registers` while a migration stops the guest, and gives it back."""
    ended = threading.Event()

    def migrate() -> None:
        while not ended.is_set():
            thread.pause()
            thread.resume()

    migration = threading.Thread(target=migrate)
    migration.start()
    try:
        for _ in range(ROUNDS):
            assert thread.run_on(lambda vcpu: vcpu.inside) is False
    finally:
        ended.set()
        migration.join(10)
    assert not migration.is_alive()


def test_who_looks_at_a_paused_vcpu_is_waited_for(thread):
    looks, go_on = threading.Event(), threading.Event()

    def look(vcpu: Any) -> bool:
        looks.set()
        go_on.wait()
        return bool(vcpu.inside)

    seen: list[bool] = []
    monitor = threading.Thread(target=lambda: seen.append(thread.run_on(look)))
    monitor.start()
    looks.wait()
    migration = threading.Thread(target=thread.resume)
    migration.start()
    time.sleep(0.02)
    assert not thread.vcpu.inside
    go_on.set()
    for each in (monitor, migration):
        each.join(10)
    assert seen == [False]
    wait_for(lambda: thread.vcpu.inside, "it runs")


def test_a_thread_that_must_start_waits_until_it_can(thread, monkeypatch):
    failures = [RuntimeError("can't start new thread")] * 3
    start = vcpus.start_new_thread

    def short_of_threads(function: Any, arguments: tuple) -> int:
        if failures:
            raise failures.pop()
        return start(function, arguments)

    thread.end()
    monkeypatch.setattr(vcpus, "start_new_thread", short_of_threads)
    with pytest.raises(RuntimeError):
        thread.start()
    thread.start(lambda: False)
    assert not failures
    thread.resume()
    wait_for(lambda: thread.vcpu.inside, "it runs")


def test_how_a_thread_is_scheduled_includes_its_nice_value(thread):
    os.setpriority(os.PRIO_PROCESS, thread.thread_id, 3)
    found = Scheduling.of(thread.thread_id)
    thread.end()
    thread.start()
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, thread.thread_id) == 3, "as before")
    os.setpriority(os.PRIO_PROCESS, thread.thread_id, 5)
    cpus, policy, priority = found.describe()
    Scheduling(cpus, policy, priority, found.nice).give(thread.thread_id)
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, thread.thread_id) == 3, "as before")


def test_cont_in_a_migration_is_its_own_affair():
    nothing: Any = None
    machine = Lifecycle(nothing, nothing, nothing, nothing, nothing)
    machine.runstate.set(runstate.FINISH_MIGRATE)
    with pytest.raises(CommandError, match="Migration is not finalized yet"):
        machine.cont()
    assert machine.runstate.current == runstate.FINISH_MIGRATE
