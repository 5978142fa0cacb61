"""An end that is asked for at any moment of an update ends the VM for good: no process is left."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from itertools import product

import psutil
import pytest
from failing import bad, start_vm
from harness.qmp import Closed
from harness.vm import VMM
from waiting import wait_for

MOMENTS = ["start", "middle", "late", "after"]
ENDINGS = ["SIGTERM", "SIGINT", "SIGHUP", "quit"]


def reach(vm, moment: str, folder) -> None:
    """Starts an update, and is back at that moment of it."""
    if moment == "middle":
        vm.qmp.command("cpr-exec", command=bad("hang-after-hello"))
        wait_for(lambda: runs_bad_program(vm.pid), "the new program runs")
    elif moment == "late":
        command = [*bad("hang"), "-incoming", f"file:{folder}/state"]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        vm.qmp.command("migrate", uri=f"file:{folder}/state")
        vm.qmp.wait_closed()
    else:
        vm.update()


def runs_bad_program(pid: int) -> bool:
    return any("bad_program" in word for word in psutil.Process(pid).cmdline())


# No monitor answers while a late update starts.
@pytest.mark.parametrize(
    ("moment", "ending"), [pair for pair in product(MOMENTS, ENDINGS) if pair != ("late", "quit")]
)
def test_it_ends_for_good(start, accel, tmp_path, moment, ending):
    pidfile = tmp_path / "pid"
    vm = start_vm(start, accel, "-pidfile", str(pidfile))
    if moment == "start":
        vm.qmp.send("cpr-exec")
    else:
        reach(vm, moment, tmp_path)
    if ending == "quit":
        with suppress(Closed):
            vm.qmp.send("quit")
            vm.qmp.wait_closed()
        if vm.processes() and moment == "start":  # it went over to the new image before
            with suppress(RuntimeError, Closed):
                vm.ask("quit")
    else:
        os.kill(vm.process.pid, getattr(signal, ending))
    wait_for(lambda: not vm.processes(), "no process is left")
    vm.process.wait(10)
    assert not pidfile.exists()
    assert "Traceback" not in vm.complaints


def test_it_ends_where_the_parent_reaps_at_once(start, accel, tmp_path):
    """A shell, or tini: nobody can be asked any more which signal had come."""
    shell = ["/bin/sh", "-c", '"$@"; exit 0', "sh", *VMM]
    vm = start_vm(start, accel, command=shell)
    (vmm,) = psutil.Process(vm.process.pid).children()
    reach(vm, "late", tmp_path)
    vmm.send_signal(signal.SIGTERM)
    wait_for(lambda: not vm.processes(), "no process is left")
    assert "terminating on signal 15" in vm.stderr
