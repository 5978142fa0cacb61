"""How much memory this process may lock for DMA, and what to do where that is too little."""

from __future__ import annotations

CAP_IPC_LOCK = 1 << 14


def has_room(size: int) -> bool:
    """Whether a process of this user may lock `size` bytes in all, by its limit."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or size <= limit:
        return True
    with open("/proc/self/status") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) & CAP_IPC_LOCK)


def memlock_remedy(size: int) -> str:
    """What to do where `size` bytes more could not be locked."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    has = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    return (
        f"{size >> 10} KiB more must be locked in memory and RLIMIT_MEMLOCK is {has}: raise it "
        "(ulimit -l, LimitMEMLOCK= of systemd) above all of the guest's RAM"
    )
