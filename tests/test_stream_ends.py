"""Whose the guest is when a stream ends: whoever may have all of it, and nobody else."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
from failing import HEARTBEAT, start_vm
from harness.qmp import QmpError
from harness.vm import Vm
from test_modes import Pair, arguments, check_churn, is_running, on, u64, wait_completed
from waiting import wait_for, wait_for_change

from cpr.constants import PAGE_SIZE

DESCRIPTION = b'{"configuration"'  # what a stream has when the guest can be loaded from it
STAYS = "the guest stays stopped: whoever has read the stream may run it"
MEMFD = "memory-backend-memfd,share=on"
FILE = "memory-backend-file,share=on,mem-path={path}"
GRACE = 0.5  # s, in which a guest that runs is seen to count


def stands_still(vm: Vm) -> bool:
    before = vm.u32(HEARTBEAT)
    time.sleep(GRACE)
    return vm.u32(HEARTBEAT) == before


class Ends(NamedTuple):
    """Of a stream, which is written to one and read from the other."""

    written: int
    read: int


@pytest.fixture(params=["socket", "pipe"])
def reader(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """With little room between them."""
    if request.param == "pipe":
        read, written = os.pipe()
        fcntl.fcntl(written, fcntl.F_SETPIPE_SZ, PAGE_SIZE)
    else:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        read, written = ours.detach(), theirs.detach()
    ends = Ends(written, read)
    yield ends
    for fd in ends:
        with suppress(OSError):
            os.close(fd)


def migrate_to(vm: Vm, reader: Ends) -> None:
    """Until all is read but the end of the description, which is not read."""
    vm.qmp.send("getfd", fdname="peer", fds=(reader.written,))
    assert vm.qmp.read_reply() == {"return": {}}
    os.close(reader.written)
    vm.qmp.command("migrate", uri="fd:peer")
    end = b""
    while DESCRIPTION not in end:
        end = end[-len(DESCRIPTION) :] + (piece := os.read(reader.read, 256))
        assert piece


def read_on(fd: int) -> None:
    while os.read(fd, 1 << 16):
        pass


def test_a_cancel_when_the_guest_can_be_loaded_does_not_run_it(start, accel, reader):
    vm = start_vm(start, accel)
    migrate_to(vm, reader)
    vm.qmp.command("migrate_cancel")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "cancelled", "it is cancelled")
    assert vm.ask("query-status")["status"] == "postmigrate"
    assert STAYS in vm.stderr
    assert stands_still(vm)
    vm.qmp.command("cont")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")


def test_no_button_is_pressed_where_the_guest_may_be_another_vmms(start, accel, reader):
    vm = start_vm(start, accel)
    migrate_to(vm, reader)
    with pytest.raises(QmpError, match="Migration is not finalized yet"):
        vm.qmp.command("system_powerdown")
    vm.qmp.command("migrate_cancel")


def test_a_quit_when_the_guest_can_be_loaded_does_not_run_it(start, accel, reader):
    vm = start_vm(start, accel)
    ram = vm.ram
    migrate_to(vm, reader)
    stopped = ram[HEARTBEAT : HEARTBEAT + 4]
    vm.qmp.send("quit")
    assert vm.process.wait(20) == 0
    assert ram[HEARTBEAT : HEARTBEAT + 4] == stopped


def test_a_reader_that_goes_when_the_guest_can_be_loaded_may_have_it(start, accel, reader):
    vm = start_vm(start, accel)
    migrate_to(vm, reader)
    os.close(reader.read)
    wait_for(lambda: vm.ask("query-migrate")["status"] == "failed", "it fails")
    assert vm.ask("query-status")["status"] == "postmigrate" and STAYS in vm.stderr


def test_a_stream_that_is_read_slowly_is_whole(start, accel, reader):
    vm = start_vm(start, accel)
    migrate_to(vm, reader)
    read_on(reader.read)
    wait_completed(vm)
    assert vm.ask("query-status")["status"] == "postmigrate"


@pytest.mark.parametrize("capabilities", [[], ["mapped-ram"]], ids=["stream", "mapped-ram"])
@pytest.mark.parametrize("backend", [MEMFD, FILE], ids=["memfd", "file"])
def test_a_target_writes_no_page_into_the_ram_of_a_source_that_runs(
    start, accel, tmp_path, backend, capabilities
):
    given = arguments(accel, backend.format(path=tmp_path / "ram"))
    pair = Pair(start, accel, tmp_path, defer=True, words=given)
    source, old = pair.source, f"file:{tmp_path}/old"
    source.qmp.command("migrate-set-capabilities", capabilities=on(*capabilities))
    wait_for_change(lambda: u64(source, 0x9018), "the guest writes")
    source.qmp.command("migrate", uri=old)
    wait_completed(source)
    source.qmp.command("cont")
    off = [entry | {"state": False} for entry in on(*capabilities)]
    source.qmp.command("migrate-set-capabilities", capabilities=off)
    pair.begin()
    target = pair.target
    target.qmp.command("migrate-set-capabilities", capabilities=on(*capabilities))
    target.qmp.command("migrate-incoming", uri=old, exit_on_error=False)
    wait_for(lambda: target.ask("query-migrate")["status"] == "failed", "it is refused")
    assert "RAM block ram0 has come with the CPR state" in target.stderr
    check_churn(source)


@pytest.mark.parametrize("backend", [MEMFD, FILE], ids=["memfd", "file"])
def test_a_late_update_whose_command_reads_another_stream(start, accel, tmp_path, backend):
    vm = start(*arguments(accel, backend.format(path=tmp_path / "ram")))
    wait_for_change(lambda: u64(vm, 0x9018), "the guest writes")
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/old")
    wait_completed(vm)
    vm.qmp.command("cont")
    command = [*vm.words, "-incoming", f"file:{tmp_path}/old"]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/new")
    vm.reconnect()
    wait_for(lambda: is_running(vm), "the guest goes on")
    assert "RAM block ram0 has come with the CPR state" in vm.stderr
    check_churn(vm)


@pytest.mark.parametrize("step", ["complete", "given-away"])
@pytest.mark.parametrize("staged", [False, True], ids=["shared", "staged"])
def test_a_fault_at_the_end_of_a_transfer_does_not_run_the_guest_twice(
    start, accel, tmp_path, staged, step
):
    fault = tmp_path / "fault"
    given = arguments(accel, "memory-backend-ram" if staged else MEMFD)
    if staged:
        given = [word.replace(",aux-ram-share=on", "") for word in given]
        given += ["-global", "migration.x-cpr-ram-staging=on"]
    source = start(*given, env=os.environ | {"CPR_FAULT": str(fault)})
    pair = Pair(start, accel, tmp_path, defer=True, source=source, words=given)
    pair.begin()
    target = pair.target
    fault.write_text(f"{step} fail")
    target.qmp.command("migrate-incoming", uri=f"unix:{pair.main}")
    wait_for(lambda: source.ask("query-migrate")["status"] == "failed", "the source fails")

    def settled() -> str:
        if not target.processes():
            return "ended"
        try:
            return "runs" if is_running(target) else ""
        except (ConnectionError, QmpError, OSError):
            return ""

    wait_for(lambda: settled() != "", "the target has it, or has ended")
    assert not (settled() == "runs" and source.ask("query-status")["running"])
