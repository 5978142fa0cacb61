"""Guests that drive a passed-through device, under this VMM or a QEMU, and their mailboxes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.vm import ROOT, VMM, Vm
from waiting import wait_for

BUILD = Path(__file__).resolve().parent.parent / "guests" / "build"
READY = 2
RAM_MIB = 64
REST = 5.0  # s, for a round to end
SECONDS = 300.0
KINDS = ["type1", pytest.param("iommufd", marks=pytest.mark.iommufd)]
DEVICE = {"type1": r"\[vfio-device\]", "iommufd": r"\[vfio-device\]|/dev/vfio/devices/"}
# Writes what the new image is given to a file, and becomes the new image.
CAPTURE = 'cat /proc/self/fd/$QEMU_CPR_EXEC_STATE >"$0"; exec "$@"'


def machine_words(program: str | Path) -> list[str]:
    """The machine of every guest: 64 MiB in a memfd, KVM, and the guest's program."""
    return [
        *("-accel", "kvm", "-nodefaults", "-display", "none", "-m", f"{RAM_MIB}M"),
        *("-object", f"memory-backend-memfd,id=ram0,size={RAM_MIB}M,share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-kernel", str(program)),
    ]


def device_words(kind: str, address: str) -> list[str]:
    """The options that give the guest a host's device by type1 or by iommufd."""
    if kind == "type1":
        return ["-device", f"vfio-pci,host={address}"]
    return [
        *("-object", "iommufd,id=iommufd0"),
        *("-device", f"vfio-pci,host={address},iommufd=iommufd0"),
    ]


class Guest:
    """A VMM that runs the guest `name`; its mailbox is read and written by the variables' names."""

    def __init__(self, name: str, vm: Vm) -> None:
        self.vm = vm
        lines = (BUILD / f"{name}.sym").read_text().splitlines()
        self.addresses = {word: int(address, 16) for address, word in map(str.split, lines)}

    def __getitem__(self, word: str) -> int:
        return self.vm.u32(self.addresses[word])

    def __setitem__(self, word: str, value: int) -> None:
        address = self.addresses[word]
        self.vm.ram[address : address + 4] = value.to_bytes(4, "little")

    def all(self) -> dict[str, int]:
        return {word: self[word] for word in self.addresses}

    def wait(self, word: str, value: int) -> None:
        """Waits until a counter has come to `value`; fails with the whole mailbox."""

        def reached() -> bool:
            assert not self["failed"], f"the guest's check in line {self['failed']} failed"
            return self[word] >= value

        try:
            wait_for(reached, f"{word} comes to {value}", SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.all()}; {self.vm.stderr}") from None

    def wait_while(self, word: str, value: int) -> None:
        wait_for(lambda: self[word] != value, f"{word} is no longer {value}", SECONDS)

    def hold(self) -> None:
        """Has the guest stand still between two rounds; `go_on` is the inverse."""
        self["hold"] = 1
        self.wait("held", 1)

    def go_on(self) -> None:
        self["hold"] = 0

    def leave_at_rest(self) -> None:
        """Ends a round, if the guest is still there.

        edu cannot be reset: one whose transfer ends when nobody has it any more raises its line,
        which the next guest would find raised.
        """
        if "held" in self.addresses and self.vm.processes():
            self["hold"] = 1
            with suppress(AssertionError):
                wait_for(lambda: self["held"] or self["failed"], "a round ends", REST)


@contextmanager
def running(name: str, *options: str, command: list[str] | None = None) -> Iterator[Guest]:
    """Boots the guest with this checkout's VMM, or another's `command`, until it has its device."""
    words = [*machine_words(BUILD / f"{name}.elf"), *options]
    with Vm(*words, command=command or VMM) as vm:
        guest = Guest(name, vm)
        guest.wait("stage", READY)
        yield guest
        guest.leave_at_rest()


def check_running(guest: Guest) -> None:
    """Two more rounds with the device; every interrupt came once, every pattern came back right."""
    guest.wait("rounds", guest["rounds"] + 2)
    guest.hold()
    found = guest.all()
    assert found["interrupts"] == found["triggered"], found
    wrong = ("mismatches", "wrong_factorials", "changed_registers")
    assert not any(found.get(word) for word in wrong), found
    guest.go_on()


def check_adapter(guest: Guest, updates: int) -> None:
    """The e1000e guest goes on over updates: each of its three vectors comes once in a round."""
    for _ in range(updates):
        guest.wait("rounds", guest["rounds"] + 2)
        guest.vm.update()
    guest.wait("rounds", guest["rounds"] + 2)
    guest.hold()
    found = guest.all()
    assert found["interrupts"] == found["triggered"] == 3 * found["rounds"], found
    vectors = [guest.vm.u32(guest.addresses["by_vector"] + 4 * i) for i in range(3)]
    assert vectors == [found["rounds"]] * 3
    assert found["changed_registers"] == 0


def locked(pid: int) -> int:
    """VmLck of a process, in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} is gone")


def own_words(vm: Vm) -> list[str]:
    return psutil.Process(vm.pid).cmdline()


def update_by_migrate(vm: Vm, command: list[str], stream: str) -> None:
    """One cpr-exec as QEMU has it: a command, and a stream that it is told to load."""
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=command)
    vm.qmp.send("migrate", uri=f"file:{stream}")
    vm.reconnect()
    wait_for_running(vm)


def wait_for_running(vm: Vm) -> None:
    """Waits until a new image has taken the guest over."""
    wait_for(
        lambda: vm.qmp.command("query-status")["running"], "the new image runs the guest", SECONDS
    )


@contextmanager
def stopped_new_image(vm: Vm) -> Iterator[Callable[[], None]]:
    """An update whose new image waits for its stream: it has all descriptors and maps nothing.

    What is yielded has it load the stream and run the guest.
    """
    stream = f"{vm.directory}/stream"
    vm.qmp.command(
        "migrate-set-parameters",
        mode="cpr-exec",
        cpr_exec_command=[*own_words(vm), "-incoming", "defer"],
    )
    vm.qmp.send("migrate", uri=f"file:{stream}")
    vm.reconnect()

    def finish() -> None:
        vm.qmp.command("migrate-incoming", uri=f"file:{stream}")
        wait_for_running(vm)

    yield finish


def inspected(file: Path) -> dict[str, Any]:
    """What the verb `inspect` says of a CprState."""
    words = [sys.executable, "-m", "cpr.vmm", "inspect", "--json", str(file)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def captured_update(vm: Vm, folder: str, root: str = "") -> dict[str, Any]:
    """Updates by `migrate`; returns what `inspect` says of the CprState that was handed over.

    `folder` is where the VMM may write, as it sees it from its `root`.
    """
    state, stream = f"{folder}/cprstate", f"{folder}/stream"
    words = own_words(vm)
    if "-incoming" not in words:
        words += ["-incoming", f"file:{stream}"]
    update_by_migrate(vm, ["/bin/sh", "-c", CAPTURE, state, *words], stream)
    return inspected(Path(root + state))
