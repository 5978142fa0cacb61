"""The ways in which a guest goes from one VMM to another, each as one function.

A way takes a Journey whose VM runs, and returns when the guest is where it goes on: `journey.vm`.
A further way is a function and a row of WAYS.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.vm import Vm
from waiting import is_listening, wait_for

RAM = "64M"
MEMFD, PRIVATE = "memory-backend-memfd,share=on", "memory-backend-ram"


class Journey:
    """A guest on KVM: the VM that has it, and what a VMM for it is started with."""

    def __init__(self, start: Any, folder: Path, image: str, backend: str, options: list[str]):
        self._start = start
        self.folder = folder
        self.words = [
            *("-nodefaults", "-display", "none", "-accel", "kvm", "-m", RAM),
            *("-object", f"{backend},id=ram0,size={RAM}"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
            *("-drive", f"file={image},format=raw,if=floppy", *options),
        ]
        self.vm: Vm = start(*self.words)

    @property
    def state(self) -> str:
        return f"{self.folder}/state"

    def start(self, *more: str) -> Vm:
        vm: Vm = self._start(*self.words, *more)
        return vm

    def wait(self, vm: Vm, status: str) -> None:
        def is_there() -> bool:
            now = vm.qmp.command("query-migrate").get("status")
            assert now != "failed" or status == "failed", vm.stderr
            return bool(now == status)

        wait_for(is_there, f"the migration is {status}")

    def wait_running(self) -> None:
        wait_for(lambda: self.vm.qmp.command("query-status")["running"], "the guest runs")


def stop_and_cont(journey: Journey) -> None:
    """Not a way at all: a guest that this disturbs is no good as a detector."""
    journey.vm.qmp.command("stop")
    journey.vm.qmp.command("cont")


def cpr_exec(journey: Journey) -> None:
    journey.vm.update()


def migrate(journey: Journey, incoming: str) -> None:
    vm = journey.vm
    command = [*vm.words, "-incoming", incoming]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    vm.qmp.command("migrate", uri=f"file:{journey.state}")
    vm.reconnect()


def migrate_late(journey: Journey) -> None:
    migrate(journey, f"file:{journey.state}")


def migrate_defer(journey: Journey) -> None:
    migrate(journey, "defer")
    journey.vm.qmp.command("migrate-incoming", uri=f"file:{journey.state}")


def stopped_for_long(journey: Journey) -> None:
    """The guest is saved some time after it was stopped, and runs some time after it was loaded."""
    journey.vm.qmp.command("stop")
    for _ in range(20):
        journey.vm.qmp.hmp("info registers")
    journey.vm.update()
    for _ in range(20):
        journey.vm.qmp.hmp("info registers")
    journey.vm.qmp.command("cont")


def twice(journey: Journey) -> None:
    journey.vm.update()
    journey.vm.update()


def cpr_transfer(journey: Journey) -> None:
    main, cpr = (
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
        for kind, path in (("main", f"{journey.folder}/main"), ("cpr", f"{journey.folder}/cpr"))
    )
    targets: list[Vm] = []
    incoming = ["-incoming", json.dumps(main), "-incoming", json.dumps(cpr)]
    thread = threading.Thread(target=lambda: targets.append(journey.start(*incoming)))
    thread.start()
    wait_for(lambda: is_listening(f"{journey.folder}/cpr"), "the target listens")
    source = journey.vm
    source.qmp.command("migrate-set-parameters", mode="cpr-transfer")
    source.qmp.command("migrate", channels=[main, cpr])
    journey.wait(source, "completed")
    thread.join(20)
    journey.vm = targets[0]


def cpr_reboot(journey: Journey) -> None:
    source = journey.vm
    source.qmp.command("migrate-set-parameters", mode="cpr-reboot")
    source.qmp.command("migrate", uri=f"file:{journey.state}")
    journey.wait(source, "completed")
    source.close()
    journey.vm = journey.start("-incoming", f"file:{journey.state}")


STAGING = ["-global", "migration.x-cpr-ram-staging=on"]

# The name of each, what it does, and the guest's RAM and further options for it.
WAYS: dict[str, tuple[Callable[[Journey], None], str, list[str]]] = {
    "stop-cont": (stop_and_cont, MEMFD, []),
    "early": (cpr_exec, MEMFD, []),
    "cpr-exec": (cpr_exec, MEMFD, ["-global", "migration.x-cpr-exec-overlap=off"]),
    "late": (migrate_late, MEMFD, []),
    "defer": (migrate_defer, MEMFD, []),
    "stopped": (stopped_for_long, MEMFD, []),
    "twice": (twice, MEMFD, []),
    "transfer": (cpr_transfer, MEMFD, []),
    "reboot": (cpr_reboot, PRIVATE, []),
    "staging": (cpr_exec, PRIVATE, STAGING),
}
