"""A load from a socket: what ends it, and where the VM comes up."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress

import pytest
from harness.qmp import Closed
from test_device_updates import Source
from waiting import wait_for


@pytest.mark.parametrize("ending", ["quit", "SIGTERM"])
@pytest.mark.parametrize("moment", ["listens", "reads"])
def test_an_end_does_not_wait_for_a_source(start, tmp_path, moment, ending) -> None:
    """Which does not come, or says nothing."""
    path = tmp_path / "main"
    vm = start("-accel", "tcg", "-display", "none", "-incoming", f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as source:
        if moment == "reads":
            source.connect(str(path))
            wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "active", "it reads")
        vm.qmp.command("migrate_cancel")
        assert vm.qmp.command("query-status")["status"] == "inmigrate"
        if ending == "quit":
            with suppress(Closed):
                vm.qmp.command("quit")
        else:
            os.kill(vm.pid, signal.SIGTERM)
        assert vm.process.wait(20) == 0
    assert not path.exists()
    assert "Traceback" not in vm.stderr


def test_the_vm_comes_up_on_the_main_loop(tmp_path, guests) -> None:
    """Where no command of a monitor's is half way through."""
    source = Source(str(guests / "heartbeat.img"))
    source.migration.migrate(f"file:{tmp_path}/stream")
    source.run_to_the_end()
    source.close()
    target = Source(str(guests / "heartbeat.img"))
    threads: list[int] = []
    try:
        incoming = target.migration.incoming_side
        incoming.commit = lambda: threads.append(threading.get_ident())
        incoming.on_running = lambda: threads.append(threading.get_ident())
        incoming.expect(False)
        address = {"transport": "socket", "type": "unix", "path": f"{tmp_path}/main"}
        incoming.start(address, False)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{tmp_path}/main")
            peer.sendall((tmp_path / "stream").read_bytes())
        while target.migration.status in ("setup", "active"):
            target.loop.iterate(10_000_000)
        assert target.migration.status == "completed", target.migration.error
        assert threads == [threading.get_ident()] * 2
    finally:
        target.close()
