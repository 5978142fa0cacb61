"""cpr-reboot, cpr-transfer and normal migration to a file, between two processes of ours."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import threading

import pytest
from harness.qmp import QmpError
from harness.vm import VMM, Vm
from waiting import is_listening, wait_for, wait_for_change

RAM = "64M"
BOOT_SECTOR = 0x7C00
INET = {
    "channel-type": "cpr",
    "addr": {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"},
}


def arguments(accel, backend):
    return [
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", RAM),
        *("-object", f"{backend},id=ram0,size={RAM}"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", "file=examples/build/churn.img,format=raw,if=floppy"),
    ]


def on(*names):
    return [{"capability": name, "state": True} for name in names]


def trail(vm):
    return [
        event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
        for event in vm.qmp.events
    ]


def u64(vm, address):
    return int(vm.qmp.hmp(f"xp /1xg {address:#x}").split(":")[1], 16)


def is_running(vm):
    return vm.qmp.command("query-status")["running"]


def check_churn(vm):
    """The guest goes on writing, and every page still holds what it should."""
    wait_for_change(lambda: u64(vm, 0x9018), "a whole round is checked", steps=2)
    assert u64(vm, 0x9020) == 0


def wait_completed(vm):
    wait_for(
        lambda: vm.qmp.command("query-migrate").get("status") in ("completed", "failed"), "the end"
    )
    assert vm.qmp.command("query-migrate")["status"] == "completed", vm.stderr


@pytest.mark.parametrize("mode", ["cpr-reboot", "normal"])
@pytest.mark.parametrize(
    ("backend", "capabilities"),
    [
        ("memory-backend-file,share=on,mem-path={path}", ["x-ignore-shared"]),
        ("memory-backend-file,share=on,mem-path={path}", []),
        ("memory-backend-ram", []),
        ("memory-backend-ram", ["mapped-ram"]),
    ],
)
def test_to_a_file_and_back_in_a_new_process(start, accel, tmp_path, mode, backend, capabilities):
    backend = backend.format(path=tmp_path / "ram")
    state = tmp_path / "state"
    source = start(*arguments(accel, backend))
    wait_for_change(lambda: u64(source, 0x9018), "the guest has written its range", steps=2)
    source.qmp.command("migrate-set-capabilities", capabilities=on("events", *capabilities))
    source.qmp.command("migrate-set-parameters", mode=mode)
    source.qmp.command("migrate", uri=f"file:{state}")
    wait_completed(source)
    order = ["setup", "STOP", "active"] if mode == "cpr-reboot" else ["setup", "active", "STOP"]
    assert trail(source) == [*order, "MIGRATION_PASS", "device", "completed"]
    assert source.qmp.command("query-status")["status"] == "postmigrate"
    told = source.qmp.command("query-migrate")
    if "mapped-ram" not in capabilities:
        assert told["ram"]["transferred"] == state.stat().st_size
    if "mapped-ram" in capabilities:
        assert state.stat().st_blocks * 512 < 64 << 20, "zero pages take no room"
        assert told["ram"]["normal"] > 4096
    elif capabilities:
        assert state.stat().st_size < 2 << 20
    else:
        assert told["ram"]["total"] > 64 << 20
        assert told["ram"]["normal"] > 4096
    with pytest.raises(QmpError, match="was paused due to previous migration"):
        source.qmp.command("migrate", uri=f"file:{state}")
    source.qmp.command("quit")
    source.qmp.wait_closed()
    source.process.wait(10)

    target = start(*arguments(accel, backend), "-incoming", "defer")
    target.qmp.command("migrate-set-capabilities", capabilities=on("events", *capabilities))
    target.qmp.command("migrate-set-parameters", mode=mode)
    target.qmp.command("migrate-incoming", uri=f"file:{state}")
    wait_completed(target)
    wait_for(lambda: target.qmp.command("query-status")["running"], "the guest resumes")
    assert trail(target) == ["setup", "active", "RESUME", "completed"]
    check_churn(target)


@pytest.mark.parametrize("share", ["on", "off"])
def test_zero_pages_of_mapped_ram_are_zero_in_a_file_with_old_bytes(start, tmp_path, share):
    old = tmp_path / "old"
    old.write_bytes(b"\xa5" * (64 << 20))
    source = start(*arguments("tcg", "memory-backend-ram"))
    wait_for_change(lambda: u64(source, 0x9018), "the guest has written its range", steps=2)
    source.qmp.command("migrate-set-capabilities", capabilities=on("mapped-ram"))
    source.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    wait_completed(source)
    backend = f"memory-backend-file,share={share},mem-path={old}"
    target = start(*arguments("tcg", backend), "-incoming", "defer")
    target.qmp.command("migrate-set-capabilities", capabilities=on("mapped-ram"))
    target.qmp.command("stop")
    target.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/state")
    wait_completed(target)
    for address in range(0, 64 << 20, 1 << 20):
        assert u64(target, address) == u64(source, address), hex(address)
    target.qmp.command("cont")
    check_churn(target)


def test_paused_stays_paused_over_a_reboot(start, accel, tmp_path):
    backend = f"memory-backend-file,share=on,mem-path={tmp_path / 'ram'}"
    source = start(*arguments(accel, backend))
    source.qmp.command("stop")
    source.qmp.command("migrate-set-parameters", mode="cpr-reboot")
    source.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    wait_completed(source)
    source.close()
    target = start(*arguments(accel, backend), "-incoming", f"file:{tmp_path}/state")
    assert target.qmp.command("query-status") == {"status": "paused", "running": False}
    target.qmp.command("cont")
    check_churn(target)


class Pair:
    """A source, and a target that waits for it on two sockets."""

    def __init__(
        self,
        start,
        accel: str,
        tmp_path,
        defer: bool,
        keyval: bool = False,
        source=None,
        words: list[str] | None = None,
    ) -> None:
        words = words or arguments(accel, "memory-backend-memfd,share=on")
        self.main, self.cpr = f"{tmp_path}/main.sock", f"{tmp_path}/cpr.sock"
        self.source = source or start(*words)
        if keyval:
            cpr = f"cpr,addr.transport=socket,addr.type=unix,addr.path={self.cpr}"
        else:
            cpr = json.dumps(channel("cpr", self.cpr))
        main = "defer" if defer else json.dumps(channel("main", self.main))
        words = [*words, "-incoming", main, "-incoming", cpr]
        self._vms: list[Vm] = []
        self._thread = threading.Thread(target=lambda: self._vms.append(start(*words)))
        self._thread.start()
        wait_for(lambda: is_listening(self.cpr), "the target listens")

    def begin(self):
        source = self.source
        wait_for_change(lambda: u64(source, 0x9018), "the guest writes")
        source.qmp.command("migrate-set-capabilities", capabilities=on("events"))
        source.qmp.command("migrate-set-parameters", mode="cpr-transfer")
        channels = [channel("main", self.main), channel("cpr", self.cpr)]
        source.qmp.command("migrate", channels=channels)

    @property
    def target(self) -> Vm:
        self._thread.join(20)
        return self._vms[0]


def channel(kind, path):
    address = {"transport": "socket", "type": "unix", "path": path}
    return {"channel-type": kind, "addr": address}


@pytest.mark.parametrize("keyval", [False, True])
@pytest.mark.parametrize("defer", [False, True])
def test_transfer(start, accel, tmp_path, defer, keyval):
    pair = Pair(start, accel, tmp_path, defer, keyval)
    pair.begin()
    target, source = pair.target, pair.source
    if defer:
        assert source.qmp.command("query-migrate") == {"status": "setup"}
        assert source.qmp.command("query-status")["running"]
        assert target.qmp.command("query-status")["status"] == "inmigrate"
        target.qmp.command("migrate-incoming", uri=f"unix:{pair.main}")
    wait_completed(source)
    wait_for(lambda: target.qmp.command("query-status")["running"], "the guest runs there")
    expected = ["setup", "STOP", "active", "MIGRATION_PASS", "device", "completed"]
    assert trail(source) == expected
    assert source.qmp.command("query-status")["status"] == "postmigrate"
    with pytest.raises(QmpError, match='Failed to get "write" lock'):
        source.qmp.command("cont")
    check_churn(target)
    target.qmp.command("quit")
    target.qmp.wait_closed()
    target.process.wait(10)
    source.qmp.command("cont")
    assert source.qmp.command("query-status")["running"]


def test_a_reset_where_the_guest_is_not_leaves_its_ram_alone(start, accel, tmp_path):
    pair = Pair(start, accel, tmp_path, defer=True)
    pair.begin()
    target, source = pair.target, pair.source
    mark, place = b"\xaa" * 8, slice(BOOT_SECTOR, BOOT_SECTOR + 8)
    source.ram[place] = mark
    target.ask("system_reset")
    assert target.ask("query-status")["status"] == "inmigrate"
    target.qmp.command("migrate-incoming", uri=f"unix:{pair.main}")
    wait_completed(source)
    source.ask("system_reset")
    source.ask("stop")
    assert source.ask("query-status")["status"] == "postmigrate"
    check_churn(target)
    assert source.ram[place] == mark
    target.close()
    source.qmp.command("cont")
    wait_for(lambda: source.ram[place] != mark, "it is booted again")


def test_a_source_does_not_run_the_guest_that_its_target_updates(start, accel, tmp_path):
    pair = Pair(start, accel, tmp_path, defer=False)
    pair.begin()
    wait_completed(pair.source)
    target = pair.target
    wait_for(lambda: target.ask("query-migrate")["status"] == "completed", "it has it")
    capabilities = on("pause-before-switchover")
    target.qmp.command("migrate-set-capabilities", capabilities=capabilities)
    target.qmp.command("cpr-exec")
    wait_for(lambda: target.ask("query-migrate")["status"] == "pre-switchover", "it waits")
    with pytest.raises(QmpError, match='Failed to get "write" lock'):
        pair.source.qmp.command("cont")
    target.qmp.command("migrate-continue", state="pre-switchover")
    target.reconnect()
    check_churn(target)
    with pytest.raises(QmpError, match='Failed to get "write" lock'):
        pair.source.qmp.command("cont")


def test_the_source_of_a_transfer_has_the_lock_until_it_lets_go(start, accel, tmp_path):
    """So that a target cannot begin to run a guest whose migration is cancelled."""
    pair = Pair(start, accel, tmp_path, defer=True)
    pair.begin()
    inode = os.stat(pair.source.ram_path()).st_ino
    with open("/proc/locks") as locks:
        assert [line for line in locks if f":{inode} " in line and str(pair.source.pid) in line]
    assert pair.target.ask("query-status")["status"] == "inmigrate"


def test_a_reset_where_the_guest_has_left_its_ram_in_a_file(start, accel, tmp_path):
    backend = f"memory-backend-file,share=on,mem-path={tmp_path}/ram"
    vm: Vm = start(*arguments(accel, backend))
    wait_for_change(lambda: u64(vm, 0x9018), "the guest writes")
    vm.qmp.command("migrate-set-capabilities", capabilities=on("x-ignore-shared"))
    vm.qmp.command("migrate-set-parameters", mode="cpr-reboot")
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    wait_completed(vm)
    with open(tmp_path / "ram", "r+b") as ram:
        ram.seek(BOOT_SECTOR)
        ram.write(b"\xaa" * 8)
        ram.flush()
        vm.ask("system_reset")
        vm.ask("stop")
        ram.seek(BOOT_SECTOR)
        assert ram.read(8) == b"\xaa" * 8


def test_a_reset_before_the_load_of_a_late_update(start, accel, tmp_path):
    vm: Vm = start(*arguments(accel, "memory-backend-memfd,share=on"))
    wait_for_change(lambda: u64(vm, 0x9018), "the guest writes")
    command = [*vm.words, "-incoming", "defer"]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
    vm.reconnect()
    mark, place = b"\xaa" * 8, slice(BOOT_SECTOR, BOOT_SECTOR + 8)
    vm.ram[place] = mark
    vm.qmp.command("system_reset")
    vm.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/state")
    wait_for(lambda: is_running(vm), "the guest runs")
    assert vm.ram[place] == mark
    check_churn(vm)


class Insists:
    """Says `cont` to a source again and again, in the background, until it is left."""

    def __init__(self, source: Vm) -> None:
        self.won = False
        self._source = source
        self._ends = False
        self._thread = threading.Thread(target=self._insist)

    def _insist(self) -> None:
        while not self._ends:
            try:
                self._source.qmp.command("cont")
                self.won = True
            except QmpError:
                pass

    def __enter__(self) -> Insists:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends = True
        self._thread.join()
        assert not self.won, "the guest runs twice"


def test_a_source_that_insists_on_its_guest(start, accel, tmp_path):
    """While the target executes itself, fails at that, and gives the guest on to a third one."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    pair = Pair(start, accel, tmp_path / "1", defer=False)
    pair.begin()
    wait_completed(pair.source)
    target = pair.target
    wait_for(functools.partial(is_running, target), "the guest runs there")
    with Insists(pair.source):
        for _ in range(3):
            target.update()
        target.qmp.send("cpr-exec", command=["/bin/false"])
        wait_for(lambda: "goes on in the old VMM" in target.stderr, "it fails")
        target.follow()
        target.qmp.close()
        target.qmp = target.connect()
        wait_for(lambda: is_running(target), "it goes on")
        second = Pair(start, accel, tmp_path / "2", defer=False, source=target)
        second.begin()
        wait_completed(target)
        wait_for(lambda: is_running(second.target), "the guest runs there")
        check_churn(second.target)
    second.target.close()
    pair.source.close()
    target.qmp.command("cont")
    assert is_running(target)


def test_a_chain_of_transfers(start, accel, tmp_path):
    vm = None
    for hop in range(3):
        folder = tmp_path / str(hop)
        folder.mkdir()
        pair = Pair(start, accel, folder, defer=False, source=vm)
        pair.begin()
        wait_completed(pair.source)
        vm = pair.target
        wait_for(functools.partial(is_running, vm), "the guest runs there")
        check_churn(vm)


def test_transfer_refusals(start, accel, tmp_path):
    vm = start(*arguments(accel, "memory-backend-memfd,share=on"))
    vm.qmp.command("migrate-set-parameters", mode="cpr-transfer")
    main = channel("main", f"{tmp_path}/main.sock")
    for arguments_, text in (
        ({"uri": f"file:{tmp_path}/x"}, "Migration requires streamable transport (eg unix)"),
        ({"uri": f"unix:{tmp_path}/x"}, "missing 'cpr' migration channel"),
        (
            {"channels": [main, channel("cpr", f"{tmp_path}/nobody.sock")]},
            f"Failed to connect to '{tmp_path}/nobody.sock': No such file or directory",
        ),
        ({"channels": [main, INET]}, "bad cpr channel address; must be unix"),
    ):
        with pytest.raises(QmpError) as refused:
            vm.qmp.command("migrate", **arguments_)
        assert str(refused.value) == text
    assert vm.qmp.command("query-status")["running"]


def test_transfer_needs_all_ram_shared(start, accel):
    vm = start(*arguments(accel, "memory-backend-ram"))
    vm.qmp.command("migrate-set-parameters", mode="cpr-transfer")
    reason = (
        "Memory region ram0 is not compatible with CPR. share=on is required for memory-backend "
        "objects, and aux-ram-share=on is required."
    )
    assert vm.qmp.command("query-migrate") == {"blocked-reasons": [reason]}
    channels = [channel("main", "/x"), channel("cpr", "/y")]
    with pytest.raises(QmpError, match="Memory region ram0 is not compatible with CPR"):
        vm.qmp.command("migrate", channels=channels)


def test_transfer_is_cancelled_while_the_target_is_not_ready(start, accel, tmp_path):
    pair = Pair(start, accel, tmp_path, defer=True)
    pair.begin()
    source = pair.source
    source.qmp.command("migrate_cancel")
    assert source.qmp.command("query-migrate")["status"] == "cancelled"
    assert trail(source) == ["setup", "cancelling", "cancelled"]
    assert source.qmp.command("query-status")["running"]
    check_churn(source)
    assert pair.target.qmp.command("query-status")["status"] == "inmigrate"


def test_a_target_that_dies_before_the_switchover_leaves_the_source_running(start, accel, tmp_path):
    pair = Pair(start, accel, tmp_path, defer=True)
    pair.begin()
    pair.target.close()
    source = pair.source
    wait_for(lambda: source.qmp.command("query-migrate")["status"] == "failed", "it fails")
    assert "Failed to connect" in source.qmp.command("query-migrate")["error-desc"]
    assert source.qmp.command("query-status")["running"]
    check_churn(source)


def test_a_wrong_state_is_refused_by_the_target(guests, accel, tmp_path):
    path = f"{tmp_path}/cpr.sock"
    words = [*arguments(accel, "memory-backend-memfd,share=on"), "-incoming", "defer"]
    words += ["-incoming", json.dumps(channel("cpr", path))]
    with subprocess.Popen([*VMM, *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: is_listening(path), "the target listens")
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(b"nonsense")
                client.shutdown(socket.SHUT_WR)
                _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 1
    assert stderr == "cpr-vmm: Not a migration stream (bad magic 6e6f6e73)\n"
