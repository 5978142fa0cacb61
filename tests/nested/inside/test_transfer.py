"""A guest that drives a real PCI device, over a cpr-transfer to another process."""

from __future__ import annotations

import json
import os
import threading

import pytest
from harness.vm import VMM, Vm
from waiting import wait_for

from .guest import BUILD, KINDS, SECONDS, Guest, device_words, machine_words, running
from .machine import EDU, command


def channel(kind: str, path: str) -> dict:
    address = {"transport": "socket", "type": "unix", "path": path}
    return {"channel-type": kind, "addr": address}


@pytest.mark.parametrize("kind", KINDS)
def test_device_goes_to_another_process(kind: str, tmp_path) -> None:
    """The source ends afterwards, and its end does not touch the device."""
    channels = [channel(each, f"{tmp_path}/{each}.sock") for each in ("main", "cpr")]
    words = [*machine_words(BUILD / "edu.elf"), *device_words(kind, EDU)]
    for each in channels:
        words += ["-incoming", json.dumps(each)]
    targets: list[Vm] = []
    with running("edu", *device_words(kind, EDU)) as guest:
        guest.wait("rounds", 1)
        enabled = command(EDU)
        thread = threading.Thread(target=lambda: targets.append(Vm(*words, command=VMM)))
        thread.start()
        wait_for(lambda: os.path.exists(f"{tmp_path}/cpr.sock"), "the target listens", SECONDS)
        guest.vm.qmp.command("migrate-set-parameters", mode="cpr-transfer")
        guest.vm.qmp.command("migrate", channels=channels)
        thread.join(SECONDS)
        (target,) = targets
        try:
            wait_for(
                lambda: target.qmp.command("query-status")["running"], "it runs there", SECONDS
            )
            there = Guest("edu", target)
            there.wait("rounds", there["rounds"] + 2)
            guest.vm.qmp.command("quit")
            wait_for(lambda: guest.vm.process.poll() is not None, "the source ends", SECONDS)
            there.wait("rounds", there["rounds"] + 2)
            there.hold()
            found = there.all()
            assert found["interrupts"] == found["triggered"], found
            assert found["mismatches"] == found["wrong_factorials"] == 0, found
            assert command(EDU) == enabled
            assert target.stderr == ""
        finally:
            target.close()
