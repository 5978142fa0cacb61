"""The VM's runner: a panic, a hang and an end are recognised, and no QEMU is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness.vm import ROOT

from .initramfs import RESULTS, build
from .kernels import KERNELS, Kernel
from .packages import PROGRAMS, Unavailable, install
from .vm import Ended, NestedVm

INIT = f"""#!/bin/sh
mkdir -p /proc /dev
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
stty -F {RESULTS} raw -echo
echo '{{"event": "init"}}' >{RESULTS}
"""
PANIC = INIT + "exit 1\n"  # a kernel whose init ends panics
SILENT = INIT + "while :; do sleep 1000; done\n"


@pytest.fixture(scope="module")
def kernel(pytestconfig: pytest.Config) -> Kernel:
    try:
        install(PROGRAMS)
        return KERNELS[pytestconfig.getoption("--nested")](lambda text: None)
    except Unavailable as error:
        pytest.skip(f"no nested VM: {error}")


@pytest.fixture
def boot(kernel: Kernel, tmp_path: Path):
    """Boots the VM with an init; the fixture ends it."""
    started: list[NestedVm] = []

    def start(init: str) -> NestedVm:
        archive = build(kernel, init, tmp_path)
        started.append(NestedVm(kernel, archive, tmp_path / "console", tmp_path / "log"))
        return started[-1]

    yield start
    for machine in started:
        machine.close()


def events_until_the_end(machine: NestedVm) -> str:
    """Reads events until the VM is given up; returns why."""
    with pytest.raises(Ended) as ended:
        while True:
            machine.event(1.0)
    return str(ended.value)


@pytest.mark.timeout(600)
def test_a_panic_is_told_with_the_last_lines_of_the_console(boot) -> None:
    text = events_until_the_end(boot(PANIC))
    assert "the VM has ended" in text
    assert "a kernel panic" in text
    assert "Attempted to kill init" in text


@pytest.mark.timeout(600)
def test_a_hang_is_told(boot, monkeypatch) -> None:
    machine = boot(SILENT)
    while machine.event(1.0) is None:
        pass
    monkeypatch.setattr(machine, "_limit", 3.0)
    assert "says nothing any more" in events_until_the_end(machine)
    pid = machine.pid
    machine.close()
    assert not psutil.pid_exists(pid)


def test_its_end_is_the_end_of_qemu_even_when_killed(kernel: Kernel, tmp_path: Path) -> None:
    archive = build(kernel, SILENT, tmp_path)
    files = [str(tmp_path / "console"), str(tmp_path / "log")]
    code = f"""
import time
from pathlib import Path
from tests.nested.vm import NestedVm
from tests.nested.kernels import Kernel
kernel = Kernel("", "", Path({str(kernel.image)!r}), [])
vm = NestedVm(kernel, Path({str(archive)!r}), *map(Path, {files!r}))
print(vm.pid, flush=True)
time.sleep(600)
"""
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        pid = int(runner.stdout.readline())
        os.kill(runner.pid, signal.SIGKILL)
    for _ in range(200):
        if has_ended(pid):
            return
        time.sleep(0.05)
    pytest.fail(f"QEMU {pid} is left behind")


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
