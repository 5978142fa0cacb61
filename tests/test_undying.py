"""A new image that is killed and does not end, as one that waits for a hung file system."""

from __future__ import annotations

import _signal
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hung_mount
import pytest
from failing import bad, start_vm
from harness.vm import HEARTBEAT
from live_programs import run
from waiting import wait_for, wait_for_change

from cpr.live import old_image

FREEZER = Path("/sys/fs/cgroup/freezer")
FROZEN, THAWED = "FROZEN", "THAWED"


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A cgroup (v1) whose tasks stand still as one in state D does: SIGKILL does not end them."""
    folder = FREEZER / f"cpr-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"{FREEZER}: {error.strerror}")
    yield folder
    (folder / "freezer.state").write_text(THAWED)
    wait_for(lambda: not (folder / "tasks").read_text(), "its tasks have ended")
    folder.rmdir()


def freeze(folder: Path) -> Callable[[int], None]:
    def step(pid: int) -> None:
        (folder / "freezer.state").write_text(FROZEN)
        (folder / "cgroup.procs").write_text(str(pid))
        state = folder / "freezer.state"
        wait_for(lambda: state.read_text().strip() == FROZEN, "it is frozen")

    return step


@pytest.mark.parametrize("way", ["early", "late"])
def test_the_guest_goes_on(start, tmp_path, frozen, way):
    vm = start_vm(start, "tcg")
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=1500)
    if way == "early":
        vm.qmp.command("cpr-exec", command=bad("hang-after-hello"))
    else:
        command = [*bad("hang"), "-incoming", f"file:{tmp_path}/state"]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
        vm.qmp.command("migrate", uri=f"file:{tmp_path}/state")
        vm.qmp.wait_closed()
    new = vm.process.pid
    wait_for(lambda: b"bad_program" in Path(f"/proc/{new}/cmdline").read_bytes(), "it runs")
    freeze(frozen)(new)
    wait_for(lambda: "the guest goes on in the old VMM" in vm.stderr, "the guest is given back")
    assert Path(f"/proc/{new}/cmdline").read_bytes(), "it has not ended"
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")


PROGRAM = """
import signal, threading
freezer = sys.argv[1]
live.state()
if live.generation:
    with open(freezer + "/freezer.state", "w") as file:
        file.write("FROZEN")
    with open(freezer + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
live.ready()
error = fails(None, mode=sys.argv[2], timeout=1.0, guard=sys.argv[3])
say("failed", str(error))
with open(freezer + "/freezer.state", "w") as file:
    file.write("THAWED")
"""


@pytest.mark.parametrize(("mode", "guard"), [("late", "vm"), ("early", "vm"), ("late", "fork")])
def test_a_program_goes_on(tmp_path, frozen, mode, guard):
    result = run(tmp_path, PROGRAM, str(frozen), mode, guard)
    ((text,),) = result.of("failed")
    assert "did not take over within 1" in text


LEADER = (
    """
import pty, signal
if "CPR_LIVE" not in os.environ:
    done, mine = os.pipe()
    out = os.dup(1)
    if pty.fork()[0]:  # it has the terminal until the last of the others has ended
        os.close(mine)
        os.read(done, 1)
        os._exit(0)
    os.dup2(out, 1)
"""
    + PROGRAM
    + """
old = error.pid_changed and os.getsid(0)
while os.path.exists(f"/proc/{old}/exe"):
    time.sleep(0.01)
time.sleep(0.2)
say("after")
"""
)


@pytest.mark.parametrize("guard", ["vm", "fork"])
def test_one_that_ends_late_hangs_up_nobodys_terminal(tmp_path, frozen, guard):
    result = run(tmp_path, LEADER, str(frozen), "late", guard)
    assert len(result.of("failed")) == 1, result.stderr
    assert result.of("after") == [[]], result.stderr


HUNG_EXEC = """
import ctypes, signal, struct
from hung_mount import mount
fuse = mount("mount")
end, told = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:  # a daemon that takes what it is asked, and answers no more than FUSE_INIT
        os.close(told)
        size, opcode, unique = struct.unpack_from("IIQ", os.read(fuse, 1 << 16))
        answer = struct.pack("IIIIHHIIHHI28x", 7, 31, 0, 0, 1, 1, 4096, 1, 1, 0, 0)
        os.write(fuse, struct.pack("IiQ", 16 + len(answer), 0, unique) + answer)
        os.read(fuse, 1 << 16)
        os.read(end, 1)
    os._exit(0)
os.wait()
os.close(fuse)
os.close(end)
live.ready()
old = os.getpid()
error = fails(["mount/program"], mode="late", timeout=1.0, guard="vm")
say("failed", error.pid_changed, os.path.exists(f"/proc/{old}"))
os.write(told, b"x")  # the daemon ends, and who waits for the file system does too
while os.path.exists(f"/proc/{old}/exe"):
    time.sleep(0.01)
time.sleep(0.1)
lock = ctypes.create_string_buffer(64)  # all that has the thread's ID: EDEADLK where it is 0
say("lock", ctypes.CDLL(None).pthread_rwlock_rdlock(lock))
"""


def test_one_that_ends_late_in_its_exec_changes_nothing_here(tmp_path):
    hung_mount.skip_without()
    (tmp_path / "mount").mkdir()
    result = run(tmp_path, HUNG_EXEC, PYTHONPATH=hung_mount.environment()["PYTHONPATH"])
    assert result.of("failed") == [[True, True]], result.stderr
    assert result.of("lock") == [[0]]


def test_a_rehearsal_on_a_thread_hears_no_hangups_again(monkeypatch):
    """The main thread does, once, and closes what tells of the end once."""
    with subprocess.Popen(["/bin/true"]) as ended:
        pidfd = os.pidfd_open(ended.pid)
    handler = _signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(old_image, "_undying", (pidfd, handler))
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: old_image.Update().close()).result()
    assert os.fstat(pidfd), "it is open"
    old_image.Update().close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)
    old_image.Update().close()
