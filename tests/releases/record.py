"""Writes what this release's updates carry to tests/data/releases/VERSION: `make release-data`.

Nothing that is there is overwritten: what a release has written stays what it was.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from conftest import MISSING, ROOT  # noqa: E402
from harness.vm import Vm  # noqa: E402
from waiting import wait_for, wait_for_change  # noqa: E402

from cpr.constants import PROGRAM_VERSION, VERSION  # noqa: E402

FOLDER = ROOT / "tests" / "data" / "releases"
KEEPER = str(Path(__file__).parent / "keeper.py")
HEARTBEAT = 0x8000
SIZE = "16M"
DEVICES = (
    *("-nodefaults", "-display", "none", "-m", SIZE, "-smp", "2", "-serial", "null"),
    *("-chardev", "null,id=log", "-device", "isa-debugcon,iobase=0xe9,chardev=log"),
    *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
)
SHARED = (
    *DEVICES,
    *("-object", f"memory-backend-memfd,id=ram0,size={SIZE},share=on"),
    *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
)
PRIVATE = (
    *DEVICES,
    *("-object", f"memory-backend-ram,id=ram0,size={SIZE}"),
    *("-machine", "pc,memory-backend=ram0"),
)
MAPPED = {"capability": "mapped-ram", "state": True}


def status(vm: Vm) -> str:
    return str(vm.ask("query-migrate").get("status"))


def record_updates(accel: str, folder: Path) -> None:
    """What a late and an early update carry, one after the other, of one guest."""
    with Vm(*SHARED, "-accel", accel) as vm:
        wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
        stream = folder / "late.vmstate"
        command = [sys.executable, KEEPER, str(folder)]
        vm.ask("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        vm.ask("migrate", uri=f"file:{stream}")
        wait_for(lambda: status(vm) == "failed", "the late update has failed")
        compress(stream)
        vm.ask("cpr-exec", command=[*command, "run"])
        wait_for(
            lambda: (folder / "hand-over.stream.gz").exists() or status(vm) == "failed", "kept"
        )
        wait_for(lambda: status(vm) == "failed", "the early update has failed")


def record_stream(accel: str, path: Path, *capabilities: dict) -> None:
    """A guest with its RAM."""
    with Vm(*PRIVATE, "-accel", accel) as vm:
        wait_for(lambda: counts(vm), "the guest counts")
        vm.ask("migrate-set-capabilities", capabilities=list(capabilities))
        vm.ask("migrate-set-parameters", mode="cpr-reboot")
        vm.ask("migrate", uri=f"file:{path}")
        wait_for(lambda: status(vm) == "completed", "the stream is written")
    compress(path)


def counts(vm: Vm) -> bool:
    return int(vm.qmp.hmp(f"xp /1xw {HEARTBEAT}").split()[1], 16) > 0


def compress(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
    path.unlink()


def main() -> int:
    top = FOLDER / VERSION
    for accel in MISSING:
        folder = top / accel
        if folder.exists():
            print(f"{folder.relative_to(ROOT)} is there, and stays as it is")
            continue
        if reason := MISSING[accel]():
            print(f"{accel}: {reason}")
            return 1
        folder.mkdir(parents=True)
        record_updates(accel, folder)
        record_stream(accel, folder / "reboot.vmstate")
        record_stream(accel, folder / "mapped.vmstate", MAPPED)
    machine = top / "machine.json"
    if not machine.exists():
        words = {"program": PROGRAM_VERSION, "shared": SHARED, "private": PRIVATE}
        machine.write_text(json.dumps(words, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
