"""Parts 1 and 4: the RAM that an update keeps, and the RAM and devices that it does not."""

from __future__ import annotations

from pathlib import Path

from ..lab import Lab
from ..match import Unavailable
from ..row import Row, Steps, step
from ..steps import (
    FILE,
    boot,
    counting,
    exits,
    guest,
    migration,
    new_command,
    parameters,
    qmp,
    refused,
    running,
    start,
    survives,
    update,
)
from .migrate import CRASHED, NO_CHANCE, PRIVATE, incompatible
from .process import FILE_BACKEND, backend

KVM_TPR_OPT = (
    "load of migration failed: Invalid argument: error while loading state for instance 0x0 of "
    "device 'kvm-tpr-opt': post load hook failed for: kvm-tpr-opt, version_id: 1, "
    "minimum_version: 1, ret: -1"
)
IVSHMEM = "-object memory-backend-memfd,id=shm0,size=1M,share=on -device ivshmem-plain,memdev=shm0"
NVME = "-device nvme,serial=1"
PEER = "Migration is disabled when using feature 'peer mode' in device 'ivshmem'"


def preserved(name: str, ram: str, *before: Steps) -> Row:
    """A kind of RAM that a guest keeps over updates."""
    return Row(
        f"ram-{name}",
        "1: aux blocks on `pc`, memory-backend-memfd, -ram, -shm, hugetlb",
        before,
        boot(guest(ram=ram)),
        update(),
        survives(),
        update(),
        survives(),
    )


def lost(name: str, options: str, text: str) -> Row:
    """RAM that QEMU loses: it execs all the same, and the new image finds nothing."""
    return Row(
        f"ram-{name}",
        "4: RAM without share=on, private file, no backend, no aux-ram-share",
        boot(options),
        counting(),
        new_command(),
        qemu=[qmp("migrate", {"uri": FILE}, {}), exits(1, KVM_TPR_OPT)],
        cpr=[
            refused("migrate", {"uri": FILE}, text),
            migration({"blocked-reasons": [text]}),
            running(),
        ],
    )


@step
def needs_huge_pages(lab: Lab) -> None:
    """Raises Unavailable unless 16 MiB of them are free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    free = (fields["HugePages_Free"] - fields["HugePages_Rsvd"]) * fields["Hugepagesize"]
    if free < 16 << 10:
        raise Unavailable("16 MiB of huge pages: write to /proc/sys/vm/nr_hugepages")


def no_such_device(device: str) -> str:
    """What is said of a device that this VMM does not have."""
    return f"-device {device}: '{device.partition(',')[0]}' is not a valid device model name"


ROWS = [
    preserved("memfd", backend("memfd")),
    preserved("memory-backend-ram", backend("ram")),
    preserved("shm", backend("shm")),
    preserved("file", FILE_BACKEND),
    preserved("hugetlb", backend("memfd", "hugetlb=on,share=on"), needs_huge_pages()),
    lost("memfd-private", guest(ram=PRIVATE), incompatible("ram0")),
    lost(
        "memory-backend-ram-private",
        guest(ram=backend("ram", "share=off")),
        incompatible("ram0"),
    ),
    lost(
        "file-private",
        guest(ram=backend("file", "mem-path=$dir/ram,share=off")),
        incompatible("ram0"),
    ),
    lost(
        "default",
        guest(ram="-m 16M", machine="-machine pc,aux-ram-share=on"),
        incompatible("pc.ram"),
    ),
    lost(
        "default-no-aux",
        guest(ram="-m 16M", machine="-machine pc"),
        incompatible("pc.ram"),
    ),
    Row(
        "only-migratable-private-ram",
        "4: -only-migratable",
        boot(guest("-only-migratable", ram=PRIVATE)),
        counting(),
        new_command(),
        qemu=[qmp("migrate", {"uri": FILE}, {}), exits(1, KVM_TPR_OPT)],
        cpr=[
            refused("migrate", {"uri": FILE}, incompatible("ram0")),
            running(),
        ],
    ),
    Row(
        "migrate-blocked-device",
        "4: non-migratable device (ivshmem peer)",
        qemu=[
            boot(guest(IVSHMEM)),
            parameters(mode="cpr-exec", cpr_exec_command=NO_CHANCE),
            refused("migrate", {"uri": FILE}, PEER),
            migration({"blocked-reasons": [PEER]}),
            running(),
        ],
        cpr=[start(guest(IVSHMEM)), exits(1, no_such_device("ivshmem-plain,memdev=shm0"))],
    ),
    Row(
        "migrate-nvme",
        "4: -device nvme",
        qemu=[
            boot(guest(NVME)),
            new_command(),
            qmp("migrate", {"uri": FILE}, {}),
            exits(CRASHED),
        ],
        cpr=[start(guest(NVME)), exits(1, no_such_device("nvme,serial=1"))],
    ),
]
