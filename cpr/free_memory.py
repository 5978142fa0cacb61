"""How much more memory this process may have: of the host, by its commit limit, in its cgroups.

What a cgroup does not have ends a process that touches it: by the OOM killer, or by SIGBUS where
the pages are huge (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/hugetlb.rst in Linux).
"""

from __future__ import annotations

import os
from contextlib import suppress

from cpr.constants import GIB, KIB, MIB, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NEVER_OVERCOMMIT = 2  # vm.overcommit_memory, Documentation/mm/overcommit-accounting.rst
V1_FILES = ("limit_in_bytes", "usage_in_bytes")
V2_FILES = ("max", "current")


def available(page_size: int = PAGE_SIZE) -> int:
    """Bytes in pages of this size.  Huge ones are reserved when they are mapped: of those only the
    limits of cgroups count.  Raises OSError where nothing is known, without /proc.
    """
    if page_size > PAGE_SIZE:
        size = f"{page_size // MIB}MB" if page_size < GIB else f"{page_size // GIB}GB"
        return min(_of_cgroups("hugetlb", f"hugetlb.{size}"), default=1 << 63)
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines())
    kib = {name: int(text.split()[0]) for name, text in fields.items()}
    rooms = [kib["MemAvailable"] * KIB, *_of_cgroups("memory", "memory")]
    if int(_read("/proc/sys/vm/overcommit_memory")) == NEVER_OVERCOMMIT:
        rooms.append((kib["CommitLimit"] - kib["Committed_AS"]) * KIB)
    return max(0, min(rooms))


def _of_cgroups(controller: str, prefix: str) -> Iterator[int]:
    """What is left of each limit of this process's cgroup and of those above it, in bytes."""
    for folder, (limit_name, usage_name) in _cgroups(controller):
        with suppress(OSError, ValueError):  # "max", or no such limit
            limit, usage = (
                int(_read(f"{folder}/{prefix}.{name}")) for name in (limit_name, usage_name)
            )
            if controller == "memory":
                usage -= _reclaimable(folder)
            yield limit - usage


def _reclaimable(folder: str) -> int:
    """Bytes that give way where memory is needed: of files, and of the kernel's caches."""
    fields = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
    kinds = ("inactive_file", "active_file", "slab_reclaimable")
    return sum(int(fields.get(f"total_{kind}", fields.get(kind, 0))) for kind in kinds)


def _cgroups(controller: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """The folders from the process's own up to the root, with the names of a limit's files."""
    mounts = dict(_mounts(controller))
    for line in _read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        is_v2 = number == "0"
        if not is_v2 and controller not in controllers.split(","):
            continue
        root, mount = mounts.get(is_v2, ("", ""))
        inside = path.removeprefix(root.rstrip("/"))
        while mount:
            yield mount + inside.rstrip("/"), V2_FILES if is_v2 else V1_FILES
            if inside in ("", "/"):
                break
            inside = os.path.dirname(inside)


def _mounts(controller: str) -> Iterator[tuple[bool, tuple[str, str]]]:
    """Of each hierarchy whether it is version 2, root and mount point (proc_pid_mountinfo(5))."""
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            yield kind == "cgroup2", (root, mount)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
