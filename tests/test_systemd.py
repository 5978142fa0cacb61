"""The example unit under the real systemd, which is PID 1 of namespaces of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness.vm import ROOT
from waiting import wait_for

SYSTEMD = "/lib/systemd/systemd"
EXAMPLE = ROOT / "examples" / "systemd" / "cpr-vmm@.service"
UNIT = "cpr-vmm@heartbeat"
SECONDS = 60.0
# Nothing that systemd writes comes to the host: its own /run and cgroups, all else read-only but
# for the folder of the test, which is also the TMPDIR of the unit.
BOOT = f"""
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount -o remount,bind,ro /
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd
ln -s "$1" /run/systemd/system
exec env -i container=other PATH="$PATH" {SYSTEMD} --system --unit=test.target \\
    --log-target=console --log-level=err --show-status=no
"""


def cgroup_mount() -> Path | None:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    return None


def missing() -> str | None:
    """Why systemd cannot run here, or None."""
    if os.geteuid() != 0:
        return "systemd in namespaces of its own needs root"
    if not os.path.exists(SYSTEMD):
        return "there is no systemd: install the package systemd"
    if cgroup_mount() is None:
        return "cgroup v2 is not mounted here"
    return None


class Systemd:
    """A systemd; `ctl` is its systemctl.  `close` ends it and all of its services."""

    def __init__(self, folder: Path) -> None:
        mount = cgroup_mount()
        assert mount is not None
        self.cgroup = mount / f"cpr-test-{os.getpid()}"
        self.cgroup.mkdir()
        names = ["--cgroup", "--pid", "--mount", "--uts", "--ipc", "--net"]
        words = ["unshare", *names, "--fork", "--kill-child", "sh", "-c", BOOT, "sh", str(folder)]
        enter = f'echo $$ >{self.cgroup}/cgroup.procs && exec "$@"'
        self._process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        parent = psutil.Process(self._process.pid)
        wait_for(lambda: parent.children(), "unshare forks")
        self._init = parent.children()[0].pid
        wait_for(lambda: psutil.Process(self._init).name() == "systemd", "systemd starts")
        wait_for(lambda: self.ctl("is-system-running") == "running", "systemd is up")

    def ctl(self, *words: str) -> str:
        """What systemctl says, stderr too."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._init), "-a", "systemctl", "--no-pager", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        return done.stdout.strip()

    def show(self, name: str) -> str:
        return self.ctl("show", "--value", f"--property={name}", UNIT)

    def close(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + SECONDS
        for folder in [*sorted(self.cgroup.rglob("*/"), reverse=True), self.cgroup]:
            while True:
                try:
                    folder.rmdir()
                    break
                except OSError:  # its processes are ending
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)


@pytest.fixture
def systemd(guests: Path, tmp_path: Path) -> Iterator[Systemd]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path / "units"
    shutil.copytree(EXAMPLE.parent, folder)
    unit = folder / EXAMPLE.name
    text = unit.read_text().replace("/opt/cpr/bin/python", sys.executable)
    text = text.replace("/etc/cpr-vmm/%i.cfg", f"{ROOT}/examples/%i.cfg")
    text = text.replace("WorkingDirectory=/etc/cpr-vmm", f"WorkingDirectory={ROOT}")
    unit.write_text(text)
    (folder / "test.target").write_text("[Unit]\nDefaultDependencies=no\n")
    alone = f"[Unit]\nDefaultDependencies=no\n[Service]\nEnvironment=TMPDIR={folder}\n"
    (folder / f"{EXAMPLE.name}.d").mkdir()
    (folder / f"{EXAMPLE.name}.d" / "test.conf").write_text(alone)
    running = Systemd(folder)
    yield running
    running.close()


def test_the_example_unit(systemd: Systemd, tmp_path: Path) -> None:
    assert systemd.ctl("start", UNIT) == ""
    assert systemd.show("ActiveState") == "active"
    pid = systemd.show("MainPID")

    assert systemd.ctl("reload", UNIT) == "", systemd.ctl("status", "-l", UNIT)
    assert systemd.show("StatusText").startswith("early update: the guest stood still for ")
    assert systemd.show("MainPID") == pid

    def reload_by(program: str) -> None:
        """What ExecReload= runs has this program, and fails; the service goes on."""
        words = f"{sys.executable} -m cpr.vmm cpr-exec ${{RUNTIME_DIRECTORY}}/reload.sock {program}"
        reload = f"[Service]\nExecReload=\nExecReload={words}\n"
        (tmp_path / "units" / f"{EXAMPLE.name}.d" / "reload.conf").write_text(reload)
        systemd.ctl("daemon-reload")
        answer = systemd.ctl("reload", UNIT)
        assert "failed" in answer, systemd.ctl("status", "-l", UNIT)
        assert systemd.show("ActiveState") == "active"

    # A program that cannot be executed: its guard is killed, and is systemd's child.
    broken = tmp_path / "broken"
    broken.write_text("no program")
    broken.chmod(0o755)
    reload_by(str(broken))
    assert "Exec format error" in systemd.show("StatusText")
    assert systemd.show("MainPID") == pid

    # One that dies, after the rehearsal is over.
    dies = """/bin/sh -c '[ -n "$$CPR_LIVE" ] && kill -9 $$$$; exec "$$@"' sh"""
    reload_by(f"{dies} {sys.executable} -m cpr.vmm run")
    assert "was ended by signal 9 before it took over" in systemd.show("StatusText")
    guard = systemd.show("MainPID")
    assert guard != pid

    assert systemd.ctl("stop", UNIT) == ""
    assert systemd.show("ActiveState") == "inactive", systemd.ctl(
        "status", "-l", UNIT
    ) + systemd.ctl("show", UNIT)
    assert systemd.show("Result") == "success"
