"""A churn guest whose RAM need not be shared, and a look into its process's memory."""

from __future__ import annotations

import re

from harness.vm import Vm
from waiting import wait_for_change

CHURN_ROUND, CHURN_MISMATCHES = 0x9018, 0x9020
CHURN_RANGE = (16 << 20, 32 << 20)
PATTERN = (40 << 20, 48 << 20)  # nothing of the guest's is there


def words(accel: str, backend: str | None, ram: str = "64M", image: str = "churn") -> list[str]:
    """The command line; `backend` None is the machine's default RAM."""
    machine = "pc" if backend is None else "pc,memory-backend=ram0"
    objects = [] if backend is None else ["-object", f"{backend},id=ram0,size={ram}"]
    return [
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", ram, "-machine", machine),
        *("-drive", f"file=examples/build/{image}.img,format=raw,if=floppy", *objects),
    ]


def u64(vm: Vm, address: int) -> int:
    return int(vm.qmp.hmp(f"xp /1xg {address:#x}").split(":")[1], 16)


def wait_round(vm: Vm, rounds: int = 2) -> None:
    """The guest goes on writing, and every page still holds what it should."""
    wait_for_change(lambda: u64(vm, CHURN_ROUND), "a whole round is checked", steps=rounds)
    assert u64(vm, CHURN_MISMATCHES) == 0


def ramblock(vm: Vm, idstr: str) -> tuple[str, int, int]:
    """(page size, bytes, host address) as `info ramblock` tells them."""
    found = re.search(
        rf"^ *{re.escape(idstr)} +(\S+ \S+)  0x\w+ 0x(\w+) 0x\w+ 0x(\w+)",
        vm.qmp.hmp("info ramblock"),
        re.MULTILINE,
    )
    assert found, idstr
    return found[1], int(found[2], 16), int(found[3], 16)


def read(vm: Vm, idstr: str, offset: int, size: int) -> bytes:
    """What the process has mapped for a block."""
    with open(f"/proc/{vm.pid}/mem", "rb", buffering=0) as file:
        file.seek(ramblock(vm, idstr)[2] + offset)
        data = b""
        while len(data) < size:
            data += file.read(size - len(data))
        return data


def write(vm: Vm, idstr: str, offset: int, data: bytes) -> None:
    """Writes behind everybody's back: for RAM that is not being copied."""
    with open(f"/proc/{vm.pid}/mem", "r+b", buffering=0) as file:
        file.seek(ramblock(vm, idstr)[2] + offset)
        assert file.write(data) == len(data)


def mapping(vm: Vm, idstr: str) -> dict[str, int]:
    """The fields of /proc/PID/smaps, in bytes, summed up over the mappings of a block."""
    _, size, host = ramblock(vm, idstr)
    total: dict[str, int] = {}
    inside = False
    with open(f"/proc/{vm.pid}/smaps") as file:
        for line in file:
            name, *rest = line.split()
            if not name.endswith(":"):
                inside = host <= int(name.split("-")[0], 16) < host + size
            elif inside and rest and rest[-1] == "kB":
                key = name[:-1]
                amount = int(rest[0]) << 10
                total[key] = amount if key.endswith("PageSize") else total.get(key, 0) + amount
    return total
