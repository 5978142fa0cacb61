"""The verb `inspect` on processes: the memfd of their CPR state, and their descriptors."""

from __future__ import annotations

import os
import subprocess
import sys

import hung_mount
import psutil
from conftest import ROOT
from inspecting import as_json, run
from waiting import TIMEOUT, wait_for

from cpr.state.cpr_state import STATE_NAME, CprState

HOLDER = """
import fcntl, os, sys
def memfd(name, data, seals=0):
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
ram = memfd("ram", bytes(8192), fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
for state in sys.argv[1:]:
    fd = memfd("QEMU_CPR_EXEC_STATE", bytes.fromhex(state).replace(b"RAMF", ram.to_bytes(4, "big")))
    os.set_inheritable(fd, True)
    os.dup(fd)
print(ram, flush=True)
sys.stdin.read()
"""


class Holder:
    """A process with a memfd 'ram' and a state memfd for each of `states`; b'RAMF' is its fd."""

    def __init__(self, *states: bytes, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *[state.hex() for state in states]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        self.pid = self.process.pid
        self.ram = int(self.process.stdout.readline())

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate()


def state_of(*names: str) -> bytes:
    fd = int.from_bytes(b"RAMF", "big")
    return CprState([(name, 0, fd) for name in names], []).encode()


def test_the_state_of_a_process():
    with Holder(state_of("ram0")) as holder:
        status, out, err = run(holder.pid)
        found = as_json(holder.pid)
        target = os.stat(f"/proc/{holder.pid}/fd/{holder.ram}")
        by_path = as_json(f"/proc/{holder.pid}/fd/{holder.ram + 1}")
    assert (status, err) == (0, "")
    assert f"process {holder.pid} descriptor {holder.ram + 2}" in out
    assert "8192 (8 KiB)  shrink,grow  on       /memfd:ram (deleted)" in out
    assert by_path["entries"] == found["entries"]
    descriptor = found["entries"][0]["descriptor"]
    assert descriptor.pop("written") == target.st_mtime_ns
    assert descriptor == {
        "fd": holder.ram,
        "target": "/memfd:ram (deleted)",
        "inode": target.st_ino,
        "size": 8192,
        "seals": ["shrink", "grow"],
        "cloexec": True,
        "offset": 8192,
    }


def test_a_descriptor_that_is_not_open():
    with Holder(CprState([("ram0", 0, 999)], []).encode()) as holder:
        status, _, err = run(holder.pid)
        assert status == 1
        assert err.endswith(
            f"offset 8 (0x8): 'ram0' id 0: descriptor 999 is not open in process {holder.pid}\n"
        )


def test_of_several_states_the_last_one_counts():
    with Holder(state_of("old"), state_of("new")) as holder:
        os.utime(f"/proc/{holder.pid}/fd/{holder.ram + 1}", (0, 0))
        found = as_json(holder.pid)
        assert [entry["name"] for entry in found["entries"]] == ["new"]
        assert f"there is also {holder.ram + 2}" in found["source"]


def test_processes_are_compared():
    with Holder(state_of("ram0")) as a, Holder(state_of("ram0")) as b:
        status, out, _ = run("--diff", a.pid, b.pid)
    assert status == 1
    assert out.splitlines()[2].startswith("entry 'ram0' id 0 inode is ")


def test_a_process_without_a_state():
    with Holder(**{STATE_NAME: "33"}) as holder:
        status, out, err = run(holder.pid)
        found = as_json(holder.pid)
    assert status == 1
    assert "/memfd:ram (deleted)" in out
    assert f"process {holder.pid} has no CPR state" in err
    assert f"is a memfd named {STATE_NAME}" in err
    assert f"it was started with {STATE_NAME}=33" in err
    assert [each["fd"] for each in found["memory"]] == [holder.ram]


def test_a_process_that_is_not_there():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert run(process.pid) == (1, "", f"cpr-vmm: there is no process {process.pid}\n")


def test_the_state_of_a_real_update(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    ram = os.stat(vm.ram_path()).st_ino
    vm.qmp.command(
        "migrate-set-parameters", mode="cpr-exec", cpr_exec_command=["/bin/sleep", "1000"]
    )
    vm.qmp.send("migrate", uri=f"file:{tmp_path}/vmstate")
    wait_for(lambda: psutil.Process(vm.pid).name() == "sleep", "the exec")
    status, _, err = run(vm.pid)
    assert (status, err) == (0, "")
    entries = {entry["name"]: entry["descriptor"] for entry in as_json(vm.pid)["entries"]}
    assert entries["ram0"]["inode"] == ram
    assert entries["ram0"]["cloexec"] is False
    status, out, err = run(tmp_path / "vmstate", "--fields")
    assert (status, err) == (0, "")
    assert '"running"' in out


def test_a_process_with_a_descriptor_on_a_file_system_that_hangs(tmp_path):
    with hung_mount.held(tmp_path) as pid:
        words = [sys.executable, "-m", "cpr.vmm", "inspect", str(pid)]
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    assert f"process {pid} has no memfds" in done.stdout
