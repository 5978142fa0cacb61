"""Side by side: QEMU's cpr-exec and this VMM's with the same device, and what each hands over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import guest as own
from . import qemu
from .guest import KINDS, Guest, captured_update, check_running, device_words
from .machine import E1000E, EDU, NVME, command
from .nvme import ENABLED

DEVICES = [("edu", EDU), ("e1000e", E1000E), ("nvme", NVME)]
RAM = ("ram0", "pc.bios", "pc.rom", "/rom@")


def use(guest: Guest, name: str) -> None:
    """The guest uses its device a little more, and finds it as it was."""
    if name == "nvme":
        guest["request"] += 1
        guest.wait("done", guest["request"])
        assert (guest["status"], guest["cc"]) == (0, ENABLED), guest.all()
        assert guest["slot"] == guest["request"] - 1
    else:
        check_running(guest)


def of_devices(state: dict[str, Any]) -> set[tuple[str, int]]:
    """Names and ids of what is not RAM."""
    entries = [(entry["name"], entry["id"]) for entry in state["entries"]]
    return {entry for entry in entries if not entry[0].startswith(RAM)}


def vfio_devices(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**each, "offset": None} for each in state["vfio_devices"]]


def of_qemu(
    name: str, address: str, options: list[str], fact: Callable[[str], None]
) -> dict[str, Any]:
    """A device that has no function-level reset does not survive in QEMU 11.1.3: told, not held."""
    with qemu.mounted() as folder, qemu.running(name, folder, *options) as guest:
        use(guest, name)
        before = command(address)
        directory = "/" + guest.vm.directory.relative_to(folder).as_posix()
        state = captured_update(guest.vm, directory, str(folder))
        fact(f"{name}: PCI_COMMAND {before:#x}, after QEMU's update {command(address):#x}")
        if name == "nvme":
            use(guest, name)
    return state


def of_this(name: str, options: list[str]) -> dict[str, Any]:
    with own.running(name, *options) as guest:
        use(guest, name)
        state = captured_update(guest.vm, str(guest.vm.directory))
        use(guest, name)
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "address"), DEVICES, ids=[name for name, _ in DEVICES])
def test_names_and_ids_are_qemus(
    name: str, address: str, kind: str, fact: Callable[[str], None]
) -> None:
    options = device_words(kind, address)
    theirs = of_qemu(name, address, options, fact)
    ours = of_this(name, options)
    fact(f"| {name}, {kind} | QEMU | cpr |")
    for entry in sorted(of_devices(theirs) | of_devices(ours)):
        ids = [str(entry[1]) if entry in of_devices(state) else "-" for state in (theirs, ours)]
        fact(f"| {entry[0]} | {' | '.join(ids)} |")
    for state in (theirs, ours):
        for each in state["vfio_devices"]:
            text = "devid {devid}, ioas_id {ioas_id}, hwpt_id {hwpt_id}".format(**each)
            fact(f"| {each['name']} in CprState/vfio devices | {text} |")
    assert of_devices(ours) == of_devices(theirs)
    assert vfio_devices(ours) == vfio_devices(theirs)
