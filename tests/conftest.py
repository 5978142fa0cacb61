"""Fixtures of the suite: the guests, a VMM of each accelerator, and why one is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.vm import Vm, children  # noqa: E402

from cpr.errors import CprError  # noqa: E402


def missing_kvm() -> str | None:
    """Why KVM cannot be used here, or None."""
    from cpr.uapi import kvm

    try:
        kvm.open_device().close()
    except CprError as error:
        return str(error)
    return None


def missing_tcg() -> str | None:
    """Why the software accelerator cannot be used here, or None."""
    from cpr.accel.tcg import TcgAccelerator

    try:
        TcgAccelerator().close()
    except CprError as error:
        return str(error)
    return None


# What changes settings of the whole machine, such as huge pages, and the nested VM: one at a time.
GROUPS = {
    "host": ("conformance", "test_survives_staging.py", "test_page_thp.py", "test_ram.py"),
    "nested": ("nested",),
}
# What has few tests that take long: begun last, one process would wait for the other's.
FIRST = (
    "nested",
    *(f"tests/test_{name}.py" for name in ("linux_virtio", "linux", "linux_boot", "side_by_side")),
    *(f"tests/test_{name}.py" for name in ("benchmarks_run", "populate", "survives_guest")),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One file at a time, and one group, goes to each of the processes that run the tests.

    Those of FIRST come first, then those with the most tests.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByPlace(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            place = Path(file).relative_to("tests").parts[0]
            return next((name for name, places in GROUPS.items() if place in places), file)

        def _assign_work_unit(self, node: Any) -> None:
            for scope in reversed(FIRST):
                if scope in self.workqueue:
                    self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return ByPlace(config, log)


MISSING = {"kvm": missing_kvm, "tcg": missing_tcg}


@pytest.fixture(scope="session")
def guests() -> Path:
    """The folder of the built guest images."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "examples")], check=True)
    return ROOT / "examples" / "build"


@pytest.fixture(scope="session")
def usable() -> dict[str, str | None]:
    return {}


@pytest.fixture(params=["kvm", "tcg"])
def accel(request: pytest.FixtureRequest, usable: dict[str, str | None]) -> str:
    """Each accelerator that works here; the others are skipped with the reason."""
    name: str = request.param
    if name not in usable:
        usable[name] = MISSING[name]()
    reason = usable[name]
    if reason is not None:
        pytest.skip(reason)
    return name


LATE = "late"
LEAVING_S = 2.0


def accel_options(accel: str) -> list[str]:
    """`-accel`; "late" is kvm with a guest that stands still while its new VMM starts."""
    if accel == LATE:
        return ["-accel", "kvm", "-global", "migration.x-cpr-exec-overlap=off"]
    return ["-accel", accel]


class Starter:
    """Starts VMMs; the fixture ends them all."""

    def __init__(self) -> None:
        self.vms: list[Vm] = []

    def __call__(self, *arguments: str, **options: Any) -> Vm:
        vm = Vm(*arguments, **options)
        self.vms.append(vm)
        return vm

    def guest(self, name: str, accel: str, *arguments: str, **options: Any) -> Vm:
        """The bundled guest `name` without a monitor on stdio, so that it is free for COM1."""
        config = f"examples/{name}.cfg"
        return self(config, *accel_options(accel), "-monitor", "none", *arguments, **options)


@pytest.fixture
def start(guests: Path) -> Iterator[Starter]:
    starter = Starter()
    yield starter
    for vm in starter.vms:
        vm.close()


@pytest.fixture(autouse=True)
def no_cpr_state_in_environment() -> None:
    assert "QEMU_CPR_EXEC_STATE" not in os.environ


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """What a test starts has ended when it is over."""
    before = children(os.getpid())
    yield
    left = [psutil.Process(pid) for pid in children(os.getpid()) if pid not in before]
    left = [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
    told = [" ".join(child.cmdline()) for child in psutil.wait_procs(left, LEAVING_S)[1]]
    assert not told, f"left running: {told}"
