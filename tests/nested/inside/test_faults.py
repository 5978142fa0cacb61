"""What goes wrong with a passed-through device, on the real interfaces: the guest runs on."""

from __future__ import annotations

import subprocess

import pytest
from harness.qmp import QmpError
from harness.vm import VMM
from waiting import wait_for

from .conftest import UNPRIVILEGED as UID
from .conftest import User, give_devices
from .guest import (
    BUILD,
    KINDS,
    SECONDS,
    check_running,
    device_words,
    locked,
    machine_words,
    own_words,
    running,
)
from .machine import EDU, SECOND_EDU, TWINS, unbind
from .new_images import wait_for_failure

RAM = 64 << 20


def refusal(*words: str, before: tuple[str, ...] = ()) -> str:
    """What a VMM that cannot start says."""
    command = [*before, *VMM, *machine_words(BUILD / "edu.elf"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_an_exec_that_fails(kind: str) -> None:
    """The addresses of the mappings are invalid by then, and are given back."""
    with running("edu", *device_words(kind, EDU)) as guest:
        guest.wait("rounds", 1)
        before = locked(guest.vm.pid)
        qmp = guest.vm.qmp
        for _ in range(3):
            qmp.command(
                "migrate-set-parameters", mode="cpr-exec", cpr_exec_command=["/nonexistent"]
            )
            qmp.command("migrate", uri=f"file:{guest.vm.directory}/stream")
            wait_for(
                lambda: qmp.command("query-migrate").get("status") == "failed", "it fails", SECONDS
            )
            assert "execvp /nonexistent failed" in qmp.command("query-migrate")["error-desc"]
            check_running(guest)
            assert locked(guest.vm.pid) == before
        guest.vm.update()
        check_running(guest)


@pytest.mark.parametrize("pair", [TWINS, (EDU, SECOND_EDU)], ids=["one group", "two groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_devices(kind: str, pair: tuple[str, str]) -> None:
    words = [*device_words(kind, pair[0]), *device_words(kind, pair[1])[-2:]]
    with running("edu", *words) as guest:
        for _ in range(3):
            guest.wait("rounds", guest["rounds"] + 1)
            guest.vm.update()
        check_running(guest)
        assert guest.vm.complaints == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_is_not_bound(kind: str) -> None:
    unbind(EDU)
    text = refusal(*device_words(kind, EDU))
    assert f"bind {EDU} to vfio-pci: echo vfio-pci > /sys/bus/pci/devices/{EDU}/" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_twice(kind: str) -> None:
    words = device_words(kind, EDU)
    assert f"vfio {EDU}: device is already attached" in refusal(*words, *words[-2:])


def test_too_little_memory_may_be_locked() -> None:
    give_devices(UID)
    before = tuple(User("user").words(RAM // 2))
    text = refusal(*device_words("type1", EDU), before=before)
    assert "VFIO_IOMMU_MAP_DMA" in text
    assert "RLIMIT_MEMLOCK is 32768 KiB: raise it" in text


@pytest.mark.iommufd
def test_an_update_that_could_not_lock_is_refused() -> None:
    give_devices(UID)
    owner = f'chown {UID} "$TMPDIR" "$TMPDIR/stderr" && exec "$@"'
    command = ["sh", "-c", owner, "sh", *User("user").words(RAM + (16 << 20)), *VMM]
    with running("edu", *device_words("iommufd", EDU), command=command) as guest:
        guest.wait("rounds", 1)
        with pytest.raises(QmpError, match="IOMMU_IOAS_CHANGE_PROCESS would fail in the new VMM"):
            guest.vm.qmp.command("cpr-exec")
        check_running(guest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_image_with_another_device_names_it(kind: str) -> None:
    """The device that the guest had is not touched, and the guest goes on with it."""
    with running("edu", *device_words(kind, EDU)) as guest:
        stream = f"{guest.vm.directory}/stream"
        command = [word.replace(EDU, SECOND_EDU) for word in own_words(guest.vm)]
        guest.vm.qmp.command(
            "migrate-set-parameters",
            mode="cpr-exec",
            cpr_exec_command=[*command, "-incoming", f"file:{stream}"],
        )
        guest.vm.qmp.send("migrate", uri=f"file:{stream}")
        wait_for_failure(guest.vm, 1)
        assert f"the CPR state has no descriptor '{SECOND_EDU}' id 0" in guest.vm.stderr
        check_running(guest)
