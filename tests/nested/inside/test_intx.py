"""A level-triggered interrupt of a real PCI device, over updates: none is lost or made up."""

from __future__ import annotations

import pytest

from .edu import IRQ_RAISE, OUTSIDE_INTERRUPT, Edu
from .guest import DEVICE, KINDS, device_words, running, stopped_new_image
from .machine import EDU
from .stolen import descriptor


@pytest.mark.parametrize("kind", KINDS)
def test_level_interrupts_go_on(kind: str) -> None:
    with running("intx", *device_words(kind, EDU)) as guest:
        for _ in range(5):
            guest.wait("rounds", guest["rounds"] + 20)
            guest.vm.update()
        guest.wait("rounds", guest["rounds"] + 20)
        guest.hold()
        found = guest.all()
        assert found["interrupts"] == found["triggered"], found
        assert guest.vm.complaints == ""


@pytest.mark.parametrize("kind", KINDS)
def test_line_that_goes_up_between_the_images(kind: str) -> None:
    with running("intx", *device_words(kind, EDU)) as guest:
        guest.wait("rounds", 5)
        guest.hold()
        with stopped_new_image(guest.vm) as finish:
            with descriptor(guest.vm, DEVICE[kind]) as fd:
                device = Edu(fd)
                device.write(IRQ_RAISE, OUTSIDE_INTERRUPT)
                device.close()
            finish()
        guest.wait("interrupts", guest["triggered"] + 1)
        guest["triggered"] += 1
        guest.go_on()
        guest.wait("rounds", guest["rounds"] + 20)
        guest.hold()
        found = guest.all()
        assert found["interrupts"] == found["triggered"], found
