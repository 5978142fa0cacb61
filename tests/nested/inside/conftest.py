"""Fixtures of the tests inside the VM: bound devices, the users that may use them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.vm import VMM

from . import machine

UNPRIVILEGED = 1000
# What a user needs for a guest of 64 MiB: iommufd counts it twice while it changes hands.
MEMLOCK = {"type1": 80 << 20, "iommufd": 200 << 20}


@pytest.fixture(autouse=True)
def bound() -> None:
    """Every device is vfio-pci's at the start of a test."""
    for address in machine.DEVICES:
        machine.bind(address)


class User:
    """Who runs a program: root, or a user who was given the devices and a memlock limit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def words(self, memlock: int) -> list[str]:
        """What is put before a command, so that it runs as this user; the PID stays the same."""
        if self.name == "root":
            return []
        who = [f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]
        return ["prlimit", f"--memlock={memlock}:{memlock}", "setpriv", *who]

    def vmm(self, kind: str) -> list[str]:
        """The command of this checkout's VMM, run by this user, whose folder is its own."""
        if self.name == "root":
            return VMM
        owner = f'chown {UNPRIVILEGED} "$TMPDIR" "$TMPDIR/stderr" && exec "$@"'
        return ["sh", "-c", owner, "sh", *self.words(MEMLOCK[kind]), *VMM]


def give_devices(uid: int) -> None:
    """Makes the device nodes a user's, as a udev rule does."""
    paths = [Path("/dev/vfio/vfio"), Path("/dev/iommu"), Path("/dev/kvm")]
    paths += [Path(f"/dev/vfio/{machine.group(address)}") for address in machine.DEVICES]
    paths += Path("/dev/vfio/devices").glob("*")
    for path in paths:
        if path.exists():
            os.chown(path, uid, uid)


@pytest.fixture(params=["root", "user"])
def user(request: pytest.FixtureRequest) -> User:
    user = User(request.param)
    give_devices(0 if user.name == "root" else UNPRIVILEGED)
    return user


@pytest.fixture
def fact(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a line in the summary of the run outside."""
    reporter: Any = request.config.pluginmanager.get_plugin("nested_reporter")
    return lambda text: reporter.send("fact", text=text)
