"""-run-with: the guest runs without the privileges, and in the root, and so does an update."""

from __future__ import annotations

import os
import subprocess

import pytest
from harness.qmp import QmpError
from harness.vm import HEARTBEAT, ROOT, VMM
from waiting import wait_for_change

from cpr.config import parse_command_line
from cpr.errors import ConfigError
from cpr.migration.run_with import DONE, RunWith, find_account, obstacles

NOBODY = 65534

# As QEMU 11.1.3 takes and refuses them.
ACCOUNTS = {
    "root": ("root", 0, 0),
    "65534:65533": ("", 65534, 65533),
    " 5:+5": ("", 5, 5),
    "0x10:010": ("", 16, 8),
    "5:4294967294": ("", 5, 4294967294),
}
NO_ACCOUNTS = (
    *("", "nosuch", "12:", ":5", "a:b", "1:2:3", "-1:5", "5:-1", "5:5 ", "1_0:5", "09:5", "65534"),
    *("99999999999:5", "4294967295:5", "5:4294967295"),
)


@pytest.mark.parametrize("text", ACCOUNTS)
def test_accounts(text):
    assert find_account(text) == ACCOUNTS[text]


@pytest.mark.parametrize("text", NO_ACCOUNTS)
def test_what_is_no_account(text):
    assert find_account(text) is None
    config = parse_command_line(["-run-with", f"user={text}"])
    refusal = f"""-run-with user={text}: User "user={text}" doesn't exist"""
    with pytest.raises(ConfigError) as raised:
        RunWith(config.run_with, after_exec=False)
    assert str(raised.value) == f"{refusal} (and is not <uid>:<gid>)"


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("foo=1", "Invalid parameter 'foo'"),
        ("async-teardown=maybe", "Parameter 'async-teardown' expects 'on' or 'off'"),
        ("nobody", "Invalid parameter 'body'"),
    ],
)
def test_arguments(argument, text):
    with pytest.raises(ConfigError, match=f"-run-with {argument}: {text}"):
        parse_command_line(["-run-with", argument])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root")
def test_a_root_that_is_not_there_is_refused_and_leaves_nothing(guests, tmp_path):
    image = f"file={guests}/heartbeat.img,format=raw,if=floppy"
    words = ["-nodefaults", "-display", "none", "-accel", "tcg", "-drive", image]
    words += ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off", "-pidfile", f"{tmp_path}/pid"]
    words += ["-run-with", "chroot=/nonexistent"]
    done = subprocess.run([*VMM, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "cpr-vmm: chroot failed: No such file or directory\n",
    )
    assert not list(tmp_path.iterdir())


def privileges(pid: int) -> list[str]:
    with open(f"/proc/{pid}/status") as file:
        values = dict(line.split(":", 1) for line in file)
    return [*values["Uid"].split(), *values["Gid"].split(), *values["Groups"].split()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give privileges up")
def test_a_guest_in_an_empty_root_runs_on_and_is_not_updated(start, accel, tmp_path):
    jail = tmp_path / "jail"
    jail.mkdir()
    pidfile = tmp_path / "pid"
    vm = start.guest(
        *("heartbeat", accel, "-pidfile", str(pidfile)),
        *("-run-with", f"user={NOBODY}:{NOBODY},chroot={jail},async-teardown=on"),
    )
    assert privileges(vm.pid) == [str(NOBODY)] * 9
    assert os.readlink(f"/proc/{vm.pid}/root") == str(jail)
    assert pidfile.stat().st_uid == NOBODY
    place = f"under -run-with chroot={jail},user={NOBODY}:{NOBODY} "
    vm.ask("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=["/bin/true"])
    with pytest.raises(QmpError, match=f"{place}execvp /bin/true failed: No such file"):
        vm.ask("migrate", uri="file:/x")
    refusals = vm.ask("cpr-exec", test=True)["refusals"]
    assert f"{place}there is no /proc, in which an update finds its descriptors" in refusals
    assert any("would refuse its command line: examples" in each for each in refusals)
    vm.ask("system_reset")
    vm.ask("human-monitor-command", command_line="migrate tcp:localhost:1")
    assert "STOP" not in [event["event"] for event in vm.qmp.events]
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
    assert "Traceback" not in vm.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root")
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_what_was_given_up_stays_so_over_an_update(start, accel, overlap, tmp_path):
    """Also where the new command says it again, as one that a client gives does."""
    words = ["-global", f"migration.x-cpr-exec-overlap={overlap}"]
    image = f"{ROOT}/examples/build/heartbeat.img"
    vm = start(
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "16M", *words),
        *("-object", "memory-backend-memfd,id=ram0,size=16M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", f"file={image},format=raw,if=floppy"),
        *("-run-with", "user=0:1,chroot=/,exit-with-parent=off"),
    )
    assert privileges(vm.pid) == [*"00001111", "1"]
    for command in (None, [*vm.words, "-incoming", f"file:{tmp_path}/state"]):
        vm.ask("cpr-exec", **({"command": command} if command else {}))
        vm.reconnect()
        assert privileges(vm.pid) == [*"00001111", "1"]
    assert "failed" not in vm.stderr
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")


def test_what_was_done_is_not_done_again(monkeypatch):
    """In the root that it has become neither the name nor the folder need be known."""
    options = parse_command_line(["-run-with", "user=gone,chroot=/gone"]).run_with
    monkeypatch.setenv(DONE, "gone//gone")
    RunWith(options, after_exec=True).apply(None)
    assert os.environ[DONE] == "gone//gone"
    with pytest.raises(ConfigError, match="doesn't exist"):
        RunWith(options, after_exec=False)


def test_nothing_is_in_the_way_where_nothing_was_given_up(monkeypatch):
    monkeypatch.delenv(DONE, raising=False)
    assert obstacles(["/nonexistent"], "kvm") == []
