"""Side by side: QEMU's own cpr-exec with the same device, and what each hands to its new image."""

from __future__ import annotations

import pytest

from . import qemu
from .guest import captured_update, device_words
from .machine import NVME
from .nvme import ENABLED

KINDS = ["type1", pytest.param("iommufd", marks=pytest.mark.iommufd)]


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_hands_over_the_controller(kind: str, fact) -> None:
    with qemu.mounted() as folder, qemu.running("nvme", folder, *device_words(kind, NVME)) as guest:
        guest["request"] = 1
        guest.wait("done", 1)
        state = captured_update(
            guest.vm, "/" + guest.vm.directory.relative_to(folder).as_posix(), str(folder)
        )
        guest["request"] = 2
        guest.wait("done", 2)
        assert (guest["status"], guest["slot"], guest["cc"]) == (0, 1, ENABLED)
    for entry in state["entries"]:
        fact(f"{kind} QEMU: {entry['name']} {entry['id']}")
    fact(str(state["vfio_devices"]))
