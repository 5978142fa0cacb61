"""Part 4: a new image that is another machine than the old one."""

from __future__ import annotations

from ..row import Row
from ..steps import (
    FILE,
    boot,
    counting,
    exits,
    goes_on_in_the_old_image,
    guest,
    new_command,
    qmp,
    survives,
    update,
)
from .stream import IN_RAM, INVALID

RAM8 = "-m 8M -object memory-backend-memfd,id=ram0,size=8M,share=on"
RAM1 = "-m 16M -object memory-backend-memfd,id=ram1,size=16M,share=on"
NO_SERIAL = (
    f"{INVALID}Unknown section or instance 'serial' 0. Make sure that your current VM "
    "setup matches your saved VM setup, including any hotplugged devices"
)
MACHINE1 = "-machine pc,memory-backend=ram1,aux-ram-share=on"


def other_side(id: str, source: str, options: str, *lines: str) -> Row:
    """The new image is another machine: it ends, and with it the guest of a QEMU."""
    return Row(
        id,
        source,
        boot(),
        counting(),
        new_command(options=options),
        qmp("migrate", {"uri": FILE}, {}),
        qemu=[exits(1, *lines)],
        cpr=[goes_on_in_the_old_image(*lines)],
    )


ROWS = [
    other_side(
        "other-side-ram-size",
        "4: new side with other -m / backend id / machine / fewer devices",
        guest(ram=RAM8),
        "Size mismatch: ram0: 0x1000000 != 0x800000: Invalid argument",
        IN_RAM,
    ),
    other_side(
        "other-side-backend",
        "4: new side with other -m / backend id / machine / fewer devices",
        guest(ram=RAM1, machine=MACHINE1),
        'Unknown ramblock "ram0", cannot accept migration',
        IN_RAM,
    ),
    Row(
        "other-side-fewer-devices",
        "4: new side with other -m / backend id / machine / fewer devices",
        boot(guest("-device isa-serial")),
        counting(),
        new_command(options=guest()),
        qmp("migrate", {"uri": FILE}, {}),
        qemu=[exits(1, NO_SERIAL)],
        cpr=[goes_on_in_the_old_image(NO_SERIAL)],
    ),
    Row(
        "other-side-more-devices",
        "4: new side with other -m / backend id / machine / fewer devices",
        boot(),
        update(options=guest("-device isa-serial")),
        survives(),
    ),
    other_side(
        "other-side-bad-option",
        "4: new side: bad option",
        guest("-bogus-option"),
        "-bogus-option: invalid option",
    ),
    Row(
        "other-side-share-off",
        "4: new side with share=off on the memfd backend",
        boot(),
        update(options=guest(ram="-m 16M -object memory-backend-memfd,id=ram0,size=16M,share=off")),
        survives(),
    ),
]
