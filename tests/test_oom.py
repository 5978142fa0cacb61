"""Where memory runs out in an update it is the new image that ends."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from failing import words
from harness.vm import VMM, Vm
from live_programs import run
from test_hard_moments import deferred
from test_silent_peers import hanging
from test_update_moments import Held, counts, status
from waiting import wait_for

from cpr.live import oom

MOST = "1000"
GROUPS = {  # of cgroup v2 and v1: the folder and the file with the limit
    Path("/sys/fs/cgroup"): "memory.max",
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
}
USED = ("memory.current", "memory.usage_in_bytes")
RECLAIM = {"memory.reclaim": "1G", "memory.force_empty": "0"}
ROOM = 256 << 10  # bytes


def score(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()


@pytest.fixture(params=["as it is", "100"])
def before(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a VMM is started with."""
    own = score(os.getpid())
    value = own if request.param == "as it is" else request.param
    try:
        Path("/proc/self/oom_score_adj").write_text(value)
        yield value
        Path("/proc/self/oom_score_adj").write_text(own)
    except OSError as error:
        pytest.skip(f"oom_score_adj: {error.strerror}")


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("step", ["config", "commit"])
def test_the_new_image_is_killed_first_until_it_commits(
    start, accel, tmp_path, before, overlap, step
):
    held = Held(start, accel, tmp_path)
    vm = held.vm
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    held.armed.write_text(f"{step} hang")
    vm.qmp.send("cpr-exec")
    guard = held.wait()
    assert (score(vm.pid), score(guard)) == (MOST, before)
    held.let_go()
    vm.reconnect()
    wait_for(lambda: score(vm.pid) == before, "it is as it was")
    counts(vm)


def test_one_that_waits_for_migrate_incoming_is_killed_first(start, accel, tmp_path, before):
    vm: Vm = start(*words(accel))
    deferred(vm, tmp_path)
    assert score(vm.pid) == MOST
    vm.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/state")
    counts(vm)
    wait_for(lambda: score(vm.pid) == before, "it is as it was")


def test_who_gets_the_pid_back_is_as_before(start, accel, before):
    vm: Vm = start(*words(accel))
    vm.qmp.command("cpr-exec", command=[*VMM, *vm.words[len(VMM) :], "-bogus"])
    wait_for(lambda: status(vm) == "failed", "it is refused")
    assert vm.follow() == vm.process.pid
    wait_for(lambda: score(vm.pid) == before, "it is as it was")


def test_one_that_boots_a_guest_of_its_own_is_as_before(start, accel, tmp_path, before):
    """A late update whose command has no -incoming, as with a QEMU."""
    vm: Vm = start(*words(accel))
    command = [*VMM, *vm.words[len(VMM) :]]
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    vm.qmp.send("migrate", uri=f"file:{tmp_path}/state")
    vm.qmp = vm.connect()
    counts(vm)
    wait_for(lambda: score(vm.pid) == before, "it is as it was")


def test_the_first_of_a_pid_namespace_is_not_killed_first(monkeypatch, tmp_path):
    """All others in it would end too, and the old image is one of them."""
    path = tmp_path / "oom_score_adj"
    path.write_text("7\n")
    monkeypatch.setattr(oom, "PATH", str(path))
    assert oom.offer(1) == ""
    oom.withdraw(1, "")
    assert path.read_text() == "7\n"


def test_where_no_descriptor_is_left_it_is_tried_again(monkeypatch, tmp_path):
    path = tmp_path / "oom_score_adj"
    path.write_text("-7\n")
    monkeypatch.setattr(oom, "PATH", str(path))
    before = oom.offer(2)
    assert path.read_text().split()[-1] == MOST
    monkeypatch.setattr(oom, "PATH", str(tmp_path / "missing" / "file"))
    oom.withdraw(2, before)
    monkeypatch.setattr(oom, "PATH", str(path))
    oom.withdraw(2, before)
    assert path.read_text() == "-7"


def test_a_program_that_is_asked_what_it_knows_is_killed_first(start, accel, tmp_path, before):
    vm: Vm = start(*words(accel))
    vm.qmp.send("cpr-exec", command=hanging(tmp_path, False))
    wait_for((tmp_path / "hangs").exists, "it is there")
    (child,) = psutil.Process(vm.pid).children()
    wait_for(lambda: score(child.pid) == MOST, "it is the first")
    assert score(vm.pid) == before
    vm.process.terminate()
    assert vm.process.wait(60) == 0


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("lives", [True, False], ids=["waits", "ends"])
def test_one_that_a_script_has_started_is_as_before(start, accel, before, overlap, lives):
    vm: Vm = start(*words(accel))
    counts(vm)
    script = '"$@"; exit $?' if lives else '"$@" & sleep 0.1'
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    command = ["/bin/sh", "-c", script, "sh", *VMM, *vm.words[len(VMM) :]]
    vm.qmp.send("cpr-exec", command=command)
    vm.reconnect()
    counts(vm)

    def scores() -> list[str]:
        found = map(psutil.Process, vm.processes())
        return [score(each.pid) for each in found if "cpr.vmm" in each.cmdline()[:3]]

    wait_for(lambda: scores() == [before], "it is as it was")


def test_where_no_descriptor_is_left_at_the_end(start, accel, before):
    vm: Vm = start(*words(accel))
    on = [{"capability": "pause-before-switchover", "state": True}]
    vm.qmp.command("migrate-set-capabilities", capabilities=on)
    vm.qmp.command("cpr-exec")
    wait_for(lambda: status(vm) == "pre-switchover", "it waits")
    (guard,) = [pid for pid in vm.processes() if pid != vm.pid]
    used = {int(name) for name in os.listdir(f"/proc/{guard}/fd")}
    free = min(set(range(max(used) + 2)) - used)
    resource.prlimit(guard, resource.RLIMIT_NOFILE, (free, max(used) + 1))
    vm.qmp.command("migrate-continue", state="pre-switchover")
    vm.reconnect()
    wait_for(lambda: score(vm.pid) == before, "it is as it was")
    counts(vm)


def test_a_rehearsed_program_is_killed_first(start, accel, tmp_path, before):
    held = Held(start, accel, tmp_path)
    held.armed.write_text("map hang")
    held.vm.qmp.send("cpr-exec", test=True)
    wait_for(lambda: not held.armed.exists(), "it is there")
    (child,) = psutil.Process(held.vm.pid).children()
    assert (score(child.pid), score(held.vm.pid)) == (MOST, before)
    held.let_go()
    assert held.vm.qmp.read_reply()["return"]["refusals"] == []


PROGRAM = """
def score():
    with open("/proc/self/oom_score_adj") as file:
        return file.read().strip()
say("at the start", score())
live.state()
say("before ready", score())
live.ready()
say("after", score())
if live.generation == 0:
    live.on_save(lambda: 1)
    live.update(mode=sys.argv[1])
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_program_of_its_own_too(tmp_path, before, mode):
    result = run(tmp_path, PROGRAM, mode)
    assert result.of("at the start") == [[before], [MOST]], result.stderr
    assert result.of("before ready") == [[before], [MOST]]
    assert result.of("after") == [[before], [before]]


GIVES_ROOT_UP = PROGRAM.replace(
    "live.ready()", "if live.generation: os.setuid(65534)\nlive.ready()"
)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", ["early", "late"])
def test_one_that_becomes_another_user_is_as_before(tmp_path, before, mode):
    """Whom the kernel would not let have less than what root has set."""
    result = run(tmp_path, GIVES_ROOT_UP, mode)
    assert result.of("after") == [[before], [before]], result.stderr


def make_group() -> tuple[Path, Path]:
    """A cgroup, and the file with its memory's limit.  Skips the test where there can be none."""
    reason = ""
    for parent, name in GROUPS.items():
        folder = parent / f"cpr-test-{os.getpid()}"
        try:
            folder.mkdir()
            limit = folder / name
            limit.write_text(limit.read_text())
        except OSError as error:
            reason = f"{parent}: {error.strerror}"
            with suppress(OSError):
                folder.rmdir()
        else:
            return folder, limit
    pytest.skip(reason)


@pytest.fixture
def group() -> Iterator[tuple[Path, Path]]:
    folder, limit = make_group()
    yield folder, limit
    wait_for(lambda: not (folder / "cgroup.procs").read_text(), "all of its tasks are gone")
    folder.rmdir()


def test_where_memory_runs_out_the_guest_goes_on(start, accel, tmp_path, group):
    """The old image has more of it in use."""
    folder, limit = group
    enter = ["/bin/sh", "-c", f'echo $$ >{folder}/cgroup.procs && exec "$@"', "sh", *VMM]
    held = Held(partial(start, command=enter), accel, tmp_path)
    vm = held.vm
    try:
        held.begin("config")
        held.wait()
        for name, amount in RECLAIM.items():  # files of which it could give memory back later
            with suppress(OSError):
                (folder / name).write_text(amount)
        used = next(each for each in folder.glob("memory.*") if each.name in USED)
        limit.write_text(str(int(used.read_text()) + ROOM))
        held.let_go()
        wait_for(lambda: status(vm) == "failed", "the update has failed")
        assert "was ended by signal 9" in vm.ask("query-migrate")["error-desc"]
        counts(vm)
    finally:
        vm.close()
