"""How much memory there is: the least of what host, cgroups and commit limit have left."""

from __future__ import annotations

import pytest

from cpr import free_memory
from cpr.constants import GIB, KIB, MIB

MEMINFO = """\
MemTotal:       16000000 kB
MemAvailable:    8388608 kB
CommitLimit:     8000000 kB
Committed_AS:    7998976 kB
HugePages_Total:       0
"""
MOUNTS_V2 = "30 24 0:26 / /cg rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
MOUNTS_V1 = """\
31 24 0:27 /box /cg/memory rw - cgroup cgroup rw,memory
32 24 0:28 / /cg/hugetlb rw - cgroup cgroup rw,hugetlb
33 24 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu
"""
V2 = {
    "/proc/self/cgroup": "0::/vms/one\n",
    "/proc/self/mountinfo": MOUNTS_V2,
    "/cg/vms/one/memory.max": "max\n",
    "/cg/vms/one/memory.current": f"{30 * MIB}\n",
    "/cg/vms/memory.max": f"{100 * MIB}\n",
    "/cg/vms/memory.current": f"{80 * MIB}\n",
    "/cg/vms/memory.stat": (
        f"anon 5\ninactive_file {MIB}\nactive_file {2 * MIB}\nslab_reclaimable {MIB}\n"
    ),
    "/cg/vms/hugetlb.2MB.max": f"{64 * MIB}\n",
    "/cg/vms/hugetlb.2MB.current": f"{60 * MIB}\n",
}
V1 = {
    "/proc/self/cgroup": "4:memory:/box/one\n3:cpu:/\n2:hugetlb:/\n",
    "/proc/self/mountinfo": MOUNTS_V1,
    "/cg/memory/one/memory.limit_in_bytes": f"{100 * MIB}\n",
    "/cg/memory/one/memory.usage_in_bytes": f"{99 * MIB}\n",
    "/cg/memory/one/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * MIB}\n",
    "/cg/hugetlb/hugetlb.1GB.limit_in_bytes": f"{2 * GIB}\n",
    "/cg/hugetlb/hugetlb.1GB.usage_in_bytes": f"{GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "overcommit", "page_size", "room"),
    [
        ({}, 0, 4 * KIB, 8 * GIB),
        ({}, 2, 4 * KIB, MIB),
        (V2, 0, 4 * KIB, 24 * MIB),
        (V2, 0, 2 * MIB, 4 * MIB),
        (V2, 0, GIB, 1 << 63),
        (V1, 1, 4 * KIB, 3 * MIB),
        (V1, 0, GIB, GIB),
    ],
)
def test_the_least_counts(monkeypatch, files, overcommit, page_size, room):
    known = {
        "/proc/self/cgroup": "",
        "/proc/self/mountinfo": "",
        "/proc/meminfo": MEMINFO,
        "/proc/sys/vm/overcommit_memory": f"{overcommit}\n",
        **files,
    }

    def read(path: str) -> str:
        try:
            return known[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(free_memory, "_read", read)
    assert free_memory.available(page_size) == room
