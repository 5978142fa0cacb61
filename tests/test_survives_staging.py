"""RAM staging: a guest whose RAM is not shared, over real execs and into other processes."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import staged_guest as guest
from harness.qmp import QmpError
from harness.vm import Vm
from staged_guest import PATTERN, mapping, ramblock, wait_round, words
from waiting import is_listening, wait_for

from cpr.constants import MIB

HUGE = 2 * MIB
MEMORY = Path("/sys/fs/cgroup/memory")
LIMITS = ("memory.limit_in_bytes", "memory.max")
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
STAGING = {"x-cpr-ram-staging": True}
# Does not end while the guest writes: its passes are so long that it writes something in each.
ENDLESS = {**STAGING, "downtime_limit": 0, "max_bandwidth": 16 * MIB}
# Without a dirty log RAM is copied in the pause, as fast as it can be.
logged = pytest.mark.parametrize("accel", ["kvm"], indirect=True)
BACKENDS = [
    pytest.param(None, "pc.ram", id="default"),
    pytest.param("memory-backend-ram", "ram0", id="ram"),
    pytest.param("memory-backend-memfd,share=off", "ram0", id="memfd"),
    pytest.param("memory-backend-file,share=off,mem-path={path}", "ram0", id="file"),
]


def capabilities(vm: Vm, *names: str) -> None:
    states = [{"capability": name, "state": True} for name in names]
    vm.qmp.command("migrate-set-capabilities", capabilities=states)


def parameters(vm: Vm, **values: object) -> None:
    vm.qmp.command("migrate-set-parameters", **values)


def status(vm: Vm) -> str:
    return str(vm.qmp.command("query-migrate").get("status"))


def ram(vm: Vm) -> dict:
    """The figures; none before the migration is active."""
    none = {"dirty-sync-count": 0, "transferred": 0}
    found: dict = vm.qmp.command("query-migrate").get("ram", none)
    return found


def trail(vm: Vm) -> list:
    """Migration states by their name, passes by their number, other events."""
    return [
        event["data"].get("status", event["data"].get("pass")) if "data" in event else name
        for event in vm.qmp.events
        for name in [event["event"]]
    ]


def memfds(vm: Vm) -> list[str]:
    return sorted(name for name in vm.descriptors().values() if name.startswith("/memfd:"))


def inodes(vm: Vm, name: str) -> dict[int, str]:
    """The memfds of that name: the inode and the path of each."""
    found = [fd for fd, target in vm.descriptors().items() if target.startswith(f"/memfd:{name} ")]
    paths = [f"/proc/{vm.pid}/fd/{fd}" for fd in found]
    return {os.stat(path).st_ino: path for path in paths}


@pytest.mark.parametrize(("backend", "idstr"), BACKENDS)
def test_all_of_ram_goes_over_while_the_guest_writes(start, accel, tmp_path, backend, idstr):
    backend = backend and backend.format(path=tmp_path / "ram")
    vm = start(*words(accel, backend))
    wait_round(vm)
    own = os.urandom(PATTERN[1] - PATTERN[0])
    guest.write(vm, idstr, PATTERN[0], own)
    last = os.urandom(4096)
    guest.write(vm, idstr, (64 * MIB) - 4096, last)
    name = "memory-backend-memfd" if backend and "memfd" in backend else idstr
    own_inodes = inodes(vm, name)
    capabilities(vm, "events", "pause-before-switchover")
    many_passes = accel == "kvm" and backend is None
    parameters(vm, **(ENDLESS if many_passes else STAGING))
    vm.qmp.command("cpr-exec")
    if many_passes:
        wait_for(lambda: ram(vm)["dirty-sync-count"] >= 3, "passes")
        assert vm.qmp.command("query-status")["running"]
        assert status(vm) == "active"
        parameters(vm, downtime_limit=2000)
    wait_for(lambda: status(vm) == "pre-switchover", "the copy is complete")
    (copy,) = [path for inode, path in inodes(vm, name).items() if inode not in own_inodes]
    assert guest.read(vm, idstr, 0, 64 * MIB) == Path(copy).read_bytes()
    told = ram(vm)
    assert told["total"] == 64 * MIB
    assert told["remaining"] == 0
    assert told["duplicate"] > 4096, "zero pages"
    assert told["transferred"] >= 24 * MIB
    assert told["normal-bytes"] == told["normal"] * 4096 >= told["transferred"] - MIB
    vm.qmp.command("migrate-continue", state="pre-switchover")
    vm.qmp.wait_closed()
    events = trail(vm)
    passes = [entry for entry in events if isinstance(entry, int)]
    assert passes == list(range(1, told["dirty-sync-count"] + 1))
    assert len(passes) >= (4 if many_passes else 3 if accel == "kvm" else 1)
    expected = ["setup", "active", "STOP", "pre-switchover", "device", "completed"]
    assert [entry for entry in events if not isinstance(entry, int)] == expected
    vm.qmp = vm.connect()
    wait_round(vm)
    assert guest.read(vm, idstr, PATTERN[0], len(own)) == own
    assert guest.read(vm, idstr, (64 * MIB) - 4096, 4096) == last
    check_shared_now(vm, idstr, name)


def check_shared_now(vm: Vm, idstr: str, name: str) -> None:
    """The next update is one of shared RAM: nothing is refused, nothing is copied."""
    assert "blocked-reasons" not in vm.qmp.command("query-migrate")
    inode = os.stat(vm.ram_path(name)).st_ino
    vm.update()
    assert os.stat(vm.ram_path(name)).st_ino == inode
    (told,) = vm.qmp.command("query-memdev")
    assert (told["id"], told["share"]) == (idstr, True)
    wait_round(vm)
    assert vm.complaints == ""


def test_a_second_update_with_staging_on_copies_nothing(start, accel):
    vm = start(*words(accel, "memory-backend-ram"), "-global", "migration.x-cpr-ram-staging=on")
    wait_round(vm)
    vm.update()
    inode = os.stat(vm.ram_path("ram0")).st_ino
    assert vm.qmp.command("query-migrate-parameters")["x-cpr-ram-staging"] is True
    capabilities(vm, "pause-before-switchover")
    vm.qmp.command("cpr-exec")
    wait_for(lambda: status(vm) == "pre-switchover", "it comes to the switchover")
    assert (ram(vm)["total"], ram(vm)["normal"]) == (0, 0)
    vm.qmp.command("migrate-continue", state="pre-switchover")
    vm.reconnect()
    assert os.stat(vm.ram_path("ram0")).st_ino == inode
    wait_round(vm)


def test_more_than_four_gigabytes(start, accel):
    """RAM in several parts of the guest's address space."""
    size = 4097
    vm = start(*words(accel, None, f"{size}M"))
    wait_round(vm)
    marks = {offset: os.urandom(8192) for offset in (2 << 30, (3 << 30) - 4096, size * MIB - 8192)}
    for offset, data in marks.items():
        guest.write(vm, "pc.ram", offset, data)
    parameters(vm, **STAGING)
    vm.update()
    for offset, data in marks.items():
        assert guest.read(vm, "pc.ram", offset, len(data)) == data
    wait_round(vm)


@logged
def test_a_cancelled_copy_leaves_the_guest_as_it_was(start, accel):
    vm = start(*words(accel, None))
    wait_round(vm)
    before = vm.descriptors()
    capabilities(vm, "events")
    parameters(vm, **STAGING, max_bandwidth=MIB)
    for _ in range(2):
        vm.qmp.command("cpr-exec")
        wait_for(lambda: ram(vm)["transferred"] > 0, "it copies")
        assert "/memfd:pc.ram (deleted)" in memfds(vm)
        vm.qmp.command("migrate_cancel")
        wait_for(lambda: status(vm) == "cancelled", "it is cancelled")
        assert vm.descriptors() == before
        assert vm.qmp.command("query-status")["running"]
    assert "STOP" not in trail(vm)
    assert trail(vm)[-2:] == ["cancelling", "cancelled"]
    wait_round(vm)
    parameters(vm, max_bandwidth=0)
    vm.update()
    wait_round(vm)


def test_a_cancel_at_the_switchover(start, accel):
    vm = start(*words(accel, None))
    before = vm.descriptors()
    capabilities(vm, "pause-before-switchover")
    parameters(vm, **STAGING)
    vm.qmp.command("cpr-exec")
    wait_for(lambda: status(vm) == "pre-switchover", "it comes to the switchover")
    vm.qmp.command("migrate_cancel")
    wait_for(lambda: status(vm) == "cancelled", "it is cancelled")
    assert vm.descriptors() == before
    wait_round(vm)
    assert "Memory region pc.ram" not in vm.qmp.hmp("info migrate")


def test_a_failed_exec_leaves_the_guest_in_its_own_ram(start, accel):
    vm = start(*words(accel, "memory-backend-ram"))
    wait_round(vm)
    before = vm.descriptors()
    parameters(vm, **STAGING)
    for _ in range(3):
        vm.qmp.command("cpr-exec", command=["/nonexistent/vmm"])
        wait_for(lambda: status(vm) == "failed", "the exec fails")
        assert vm.qmp.command("query-migrate")["error-desc"] == (
            "execvp /nonexistent/vmm failed: No such file or directory"
        )
        assert vm.descriptors() == before
        wait_round(vm)
    vm.update()
    wait_round(vm)


def test_a_cgroup_with_no_room_for_a_copy(start, accel):
    """It is refused: the OOM killer would take the VMM, and the guest with it."""
    group = MEMORY / f"cpr-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = next(path for path in map(group.joinpath, LIMITS) if path.exists())
    except (OSError, StopIteration):
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"{MEMORY} has no memory cgroups that can be made here")
    vm = start(*words(accel, None))
    try:
        wait_round(vm)
        (group / "cgroup.procs").write_text(str(vm.pid))
        limit.write_text(str(12 * MIB))
        parameters(vm, **STAGING)
        with pytest.raises(QmpError, match=r"raise the limit of this process's cgroup"):
            vm.qmp.command("cpr-exec")
        wait_round(vm)
        limit.write_text(str(256 * MIB))
        vm.update()
        wait_round(vm)
    finally:
        vm.close()
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "all have ended")
        group.rmdir()


@logged
def test_the_rate_limit_is_kept_and_may_change(start, accel):
    limit = 4 * MIB
    vm = start(*words(accel, None))
    wait_round(vm)
    parameters(vm, **STAGING, max_bandwidth=limit, downtime_limit=0)
    vm.qmp.command("cpr-exec")
    last = 0
    while last < 2 * MIB:
        told = vm.qmp.command("query-migrate")
        allowed = limit * ((told.get("total-time", 0) + 1) / 1000 + 0.1) + 4096
        transferred = told["ram"]["transferred"] if "ram" in told else 0
        assert last <= transferred <= allowed
        last = transferred
    assert "transferred=" in vm.qmp.hmp("info migrate")
    vm.qmp.hmp("migrate_set_parameter max-bandwidth 0")
    vm.qmp.hmp("migrate_set_parameter downtime-limit 2000")
    vm.reconnect()  # in time: 24 MiB would have taken 6 s
    wait_round(vm)


@logged
def test_stop_cont_and_reset_while_it_is_copied(start, accel):
    vm = start(*words(accel, None))
    wait_round(vm)
    parameters(vm, **ENDLESS)
    vm.qmp.command("cpr-exec")
    wait_for(lambda: ram(vm)["dirty-sync-count"] >= 2, "passes")
    vm.qmp.command("system_reset")  # writes the boot sector again
    wait_for(lambda: guest.u64(vm, guest.CHURN_ROUND) > 2, "it starts again")
    vm.qmp.command("stop")
    vm.reconnect()  # a guest that stands still leaves nothing to copy
    assert vm.qmp.command("query-status")["status"] == "paused"
    vm.qmp.command("cont")
    wait_round(vm)


@logged
def test_quit_while_it_is_copied(start, accel):
    vm = start(*words(accel, None))
    wait_round(vm)
    parameters(vm, **ENDLESS)
    vm.qmp.command("cpr-exec")
    wait_for(lambda: ram(vm)["dirty-sync-count"] >= 2, "passes")
    vm.qmp.send("quit")
    assert vm.process.wait(10) == 0
    assert "Traceback" not in vm.stderr


# Page sizes.


@pytest.fixture
def huge_pages():
    """128 MiB of them, given back at the end."""
    number = POOL / "nr_hugepages"
    if not os.access(number, os.W_OK):
        pytest.skip(f"{number} cannot be written")
    before = number.read_text()
    number.write_text("64")
    try:
        if int((POOL / "free_hugepages").read_text()) < 64:
            pytest.skip(f"this host has no room for 64 huge pages: {number}")
        yield
    finally:
        number.write_text(before)


@pytest.mark.parametrize(
    ("backend", "idstr"),
    [
        pytest.param(None, "pc.ram", id="private"),
        pytest.param("memory-backend-memfd,share=on", "ram0", id="shared"),
    ],
)
def test_to_huge_pages_and_back(start, accel, huge_pages, backend, idstr):
    vm = start(*words(accel, backend))
    wait_round(vm)
    own = os.urandom(PATTERN[1] - PATTERN[0])
    guest.write(vm, idstr, PATTERN[0], own)
    for size, shown in ((HUGE, "2 MiB"), (4096, "4 KiB")):
        parameters(vm, **STAGING, x_cpr_ram_pagesize=size)
        assert vm.qmp.command("cpr-exec", test=True) == {"refusals": []}
        vm.update()
        assert ramblock(vm, idstr)[:2] == (shown, 64 * MIB)
        assert mapping(vm, idstr)["KernelPageSize"] == size
        assert guest.read(vm, idstr, PATTERN[0], len(own)) == own
        wait_round(vm)
        assert "blocked-reasons" not in vm.qmp.command("query-migrate")
        vm.update()  # without parameters: it stays where it is
        assert ramblock(vm, idstr)[0] == shown
        wait_round(vm)
    # By the guard, which comes after all others on its CPU.
    wait_for(lambda: (POOL / "free_hugepages").read_text() == "64\n", "they are given back")
    assert vm.complaints == ""


@pytest.mark.parametrize(
    ("size", "pages", "text"),
    [
        (
            "64M",
            HUGE,
            "x-cpr-ram-staging: unable to map backing store for guest RAM: Cannot allocate memory; "
            f"'pc.ram' needs 32 pages of 2048 KiB and 0 are free: echo 32 > {POOL}/nr_hugepages",
        ),
        (
            "65M",
            HUGE,
            "x-cpr-ram-pagesize: the size of 'pc.ram', 0x4100000, is not a multiple of the page "
            "size 0x200000",
        ),
        ("64M", 8 * MIB, "x-cpr-ram-pagesize: this host has no pages of 8388608 bytes, only of "),
    ],
    ids=["too few", "size", "no such pages"],
)
def test_pages_that_cannot_be_had(start, accel, size, pages, text):
    if "needs" in text and int((POOL / "free_hugepages").read_text()):
        pytest.skip(f"huge pages are free: {POOL}/nr_hugepages")
    vm = start(*words(accel, None, size))
    wait_round(vm)
    before = vm.descriptors()
    parameters(vm, **STAGING, x_cpr_ram_pagesize=pages)
    assert vm.qmp.command("cpr-exec", test=True)["refusals"][0].startswith(text)
    with pytest.raises(QmpError) as refused:
        vm.qmp.command("cpr-exec")
    assert str(refused.value).startswith(text)
    assert vm.descriptors() == before
    assert vm.qmp.command("query-status")["running"]
    wait_round(vm)


def test_a_page_size_needs_staging(start, accel):
    vm = start(*words(accel, "memory-backend-memfd,share=on"))
    vm.qmp.hmp("migrate_set_parameter x-cpr-ram-pagesize 2M")
    with pytest.raises(QmpError, match="x-cpr-ram-pagesize needs x-cpr-ram-staging=on"):
        vm.qmp.command("cpr-exec")
    vm.qmp.hmp("migrate_set_parameter x-cpr-ram-pagesize 4k")
    vm.update()


def test_ram_in_a_file_stays_there(start, accel, tmp_path):
    vm = start(*words(accel, f"memory-backend-file,share=on,mem-path={tmp_path / 'ram'}"))
    parameters(vm, **STAGING, x_cpr_ram_pagesize=HUGE)
    with pytest.raises(QmpError, match="x-cpr-ram-pagesize cannot move 'ram0', whose RAM is in a"):
        vm.qmp.command("cpr-exec")
    parameters(vm, x_cpr_ram_pagesize=0)
    vm.update()
    wait_round(vm)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("staging", "on", "Invalid parameter type for 'x-cpr-ram-staging', expected: boolean"),
        ("pagesize", True, "Parameter 'x-cpr-ram-pagesize' expects uint64"),
        ("pagesize", "2M", "Parameter 'x-cpr-ram-pagesize' expects uint64"),
        ("pagesize", 5000, "Option x-cpr-ram-pagesize expects 0 or a power of two no less than"),
        ("pagesize", 2048, "Option x-cpr-ram-pagesize expects 0 or a power of two no less than"),
    ],
)
def test_bad_parameters(start, accel, name, value, text):
    vm = start(*words(accel, None))
    with pytest.raises(QmpError) as refused:
        parameters(vm, **{f"x-cpr-ram-{name}": value})
    assert str(refused.value).startswith(text)
    assert "x-cpr-ram" not in vm.qmp.hmp("info migrate_parameters")


# cpr-transfer.


def channel(kind: str, path: Path) -> dict:
    address = {"transport": "socket", "type": "unix", "path": str(path)}
    return {"channel-type": kind, "addr": address}


class Pair:
    """A source whose RAM is not shared, and a target that waits for it."""

    def __init__(self, start, accel: str, folder: Path, backend: str | None = None) -> None:
        self.paths = {kind: folder / f"{kind}.sock" for kind in ("main", "cpr")}
        self.source = start(*words(accel, backend))
        wait_round(self.source)
        capabilities(self.source, "events")
        incoming = [
            f"-incoming={json.dumps(channel(kind, path))}" for kind, path in self.paths.items()
        ]
        options = [word for each in incoming for word in each.split("=", 1)]
        self._vms: list[Vm] = []
        self._thread = threading.Thread(
            target=lambda: self._vms.append(start(*words(accel, backend), *options))
        )
        self._thread.start()
        wait_for(lambda: is_listening(str(self.paths["cpr"])), "the target listens")

    def begin(self) -> None:
        channels = [channel(kind, path) for kind, path in self.paths.items()]
        self.source.qmp.command("migrate", channels=channels)

    @property
    def target(self) -> Vm:
        self._thread.join(20)
        return self._vms[0]


@pytest.mark.parametrize(("backend", "idstr"), BACKENDS[:2])
def test_transfer(start, accel, tmp_path, backend, idstr):
    pair = Pair(start, accel, tmp_path, backend)
    source = pair.source
    parameters(source, mode="cpr-transfer")
    with pytest.raises(QmpError, match=f"Memory region {idstr} is not compatible with CPR"):
        pair.begin()
    parameters(source, **STAGING)
    own = os.urandom(PATTERN[1] - PATTERN[0])
    guest.write(source, idstr, PATTERN[0], own)
    pair.begin()
    wait_for(lambda: status(source) in ("completed", "failed"), "the end")
    assert status(source) == "completed", source.stderr
    assert ram(source)["transferred"] >= 24 * MIB
    target = pair.target
    wait_for(lambda: target.qmp.command("query-status")["running"], "the guest runs there")
    assert guest.read(target, idstr, PATTERN[0], len(own)) == own
    wait_round(target)
    events = [entry for entry in trail(source) if not isinstance(entry, int)]
    assert events == ["setup", "active", "STOP", "device", "completed"]
    with pytest.raises(QmpError, match='Failed to get "write" lock'):
        source.qmp.command("cont")
    assert "blocked-reasons" not in target.qmp.command("query-migrate")
    target.update()
    wait_round(target)
    target.qmp.send("quit")
    target.process.wait(10)
    held = set(memfds(source))
    source.qmp.command("cont")
    wait_round(source)
    assert held > set(memfds(source)), "the copies are given up"


@logged
def test_a_target_of_a_cancelled_migration_does_not_take_the_guest(start, accel, tmp_path):
    """It listens still when the target of the next one has died, and its copy is an old one."""
    pair = Pair(start, accel, tmp_path)
    source = pair.source
    parameters(source, **ENDLESS, mode="cpr-transfer")
    pair.begin()
    wait_for(lambda: ram(source)["transferred"] > 0, "it copies")
    source.qmp.command("migrate_cancel")
    wait_for(lambda: status(source) == "cancelled", "it is cancelled")
    parameters(source, max_bandwidth=0, downtime_limit=2000)
    with socket.create_server(str(pair.paths["cpr"]), family=socket.AF_UNIX) as second:
        pair.begin()
        connection = second.accept()[0]
        while connection.recv(65536):
            pass
        connection.close()
    target = pair.target
    wait_for(lambda: "start this VMM again" in target.stderr, "it refuses")
    wait_for(lambda: status(source) == "completed", "the source has sent all")
    source.qmp.command("cont")
    wait_round(source)
    assert target.process.wait(20) == 1


@logged
def test_a_target_that_dies_leaves_the_source_running(start, accel, tmp_path):
    pair = Pair(start, accel, tmp_path)
    source = pair.source
    before = source.descriptors()
    parameters(source, **STAGING, mode="cpr-transfer", max_bandwidth=MIB)
    pair.begin()
    wait_for(lambda: ram(source)["transferred"] > 0, "it copies")
    target = pair.target
    assert target.qmp.command("query-status")["status"] == "inmigrate", "its monitor answers"
    target.close()
    parameters(source, max_bandwidth=0)
    wait_for(lambda: status(source) == "failed", "it fails")
    assert "Failed to connect" in source.qmp.command("query-migrate")["error-desc"]
    assert "STOP" not in trail(source)
    assert source.descriptors() == before
    wait_round(source)
