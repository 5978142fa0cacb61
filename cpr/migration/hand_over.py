"""What old and new VMM say of the guest in a hand-over: what it needs, and its CPR state."""

from __future__ import annotations

import os
import stat

from cpr.constants import PROGRAM_VERSION
from cpr.errors import StateError
from cpr.live.transaction import PROTOCOL, STATE, UpdateError
from cpr.state import cpr_channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from cpr.live.messages import Message
    from cpr.live.old_image import Update
    from cpr.machine import Machine
    from cpr.migration.placement import Placement
    from cpr.state.cpr_state import CprState

IDENTITY = ("device", "inode", "type", "size")


def describe(machine: Machine) -> dict[str, Any]:
    """What a new VMM must have for this guest, as plain data."""
    return {
        "machine": machine.config.machine_type,
        "accel": machine.accel.name,
        "vcpus": len(machine.vcpus),
        "ram": [[block.idstr, block.size] for block in machine.blocks],
        "sections": [
            [device.idstr, device.instance_id, device.vmstate.version_id]
            for device in machine.sections()
            if device.vmstate is not None and device.needed()
        ],
        "native": machine.accel.native_layout(),
    }


def differences(machine: Machine, wanted: dict[str, Any]) -> list[str]:
    """Why this machine cannot take over a guest of the one that was described; empty if it can."""
    own = describe(machine)
    found = []
    for key, text in (("machine", "machine type"), ("accel", "accelerator"), ("vcpus", "CPUs")):
        if wanted[key] != own[key]:
            found.append(f"{text}: the guest has {wanted[key]}, this VMM would have {own[key]}")
    blocks = dict(own["ram"])
    for idstr, size in wanted["ram"]:
        if idstr not in blocks:
            found.append(f'Unknown ramblock "{idstr}", cannot accept migration')
        elif blocks[idstr] != size:
            found.append(f"Size mismatch: {idstr}: {size:#x} != {blocks[idstr]:#x}")
    # Also those of which this guest makes no use.
    described = {(d.idstr, d.instance_id): d.vmstate for d in machine.sections()}
    for idstr, instance, version in wanted["sections"]:
        vmstate = described.get((idstr, instance))
        if vmstate is None:
            found.append(f"the guest has the device '{idstr}' {instance}, this VMM has none")
        elif vmstate.version_id < version:
            found.append(f"unsupported version {version} for '{idstr}' v{vmstate.version_id}")
        elif vmstate.minimum_version_id > version:
            found.append(
                f"version {version} of '{idstr}' is too old: this VMM loads "
                f"{vmstate.minimum_version_id} to {vmstate.version_id}"
            )
    return found


def check_protocol(message: Message) -> None:
    """Raises UpdateError where the new program's hello is of another version than ours."""
    version, program = message.body.get("protocol"), message.body.get("program", "")
    if version != PROTOCOL:
        raise UpdateError(
            f"the new program ({program}) speaks version {version} of the hand-over, this one "
            f"{PROTOCOL}"
        )


def send_state(
    update: Update,
    machine: Machine,
    state: CprState,
    failure: str,
    placement: Placement,
    sections: Iterable[tuple[str, int]] = (),
    stream: bytes = b"",
) -> None:
    """Sends what a new VMM builds its machine from; `failure` is why the one before has failed.

    `stream` has the `sections` that could be saved while the guest runs, if there are.
    """
    body = {
        "program": PROGRAM_VERSION,
        "pid": update.pid,
        "guest": describe(machine),
        "cpu": machine.accel.cpu_model(),
        "failure": failure,
        "placement": placement.describe(),
        "nice": placement.nice,
        "sections": list(sections),
    }
    send(update, STATE, body, state, stream)


def send(update: Update, kind: str, body: dict, state: CprState | None, stream: bytes) -> None:
    """Sends a message of this kind with a CPR state, if there is one, and the stream."""
    data, fds = b"", []
    if state is not None:
        for piece, fd in cpr_channel.messages(state):
            data += piece
            fds += [fd] if fd >= 0 else []
        body = {**body, "descriptors": [identify(fd) for _, _, fd in state.fds]}
    update.send(kind, {**body, "cpr": data.hex()}, fds, stream)


def identify(fd: int) -> list[int]:
    """What a descriptor is: device, inode, type and size of what it is open on."""
    status = os.fstat(fd)
    return [status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode), status.st_size]


def decode_state(message: Message, what: tuple[str, ...] = IDENTITY) -> CprState:
    """The CPR state of a message, whose descriptors are the caller's from now on.

    `what` is the part of IDENTITY that is compared.  Raises StateError where one is not what the
    sender says; then none stays open.
    """
    descriptors, message.fds = message.fds, []
    try:
        state = cpr_channel.decode(bytes.fromhex(message.body["cpr"]), descriptors)
        _check_identities(state, message.body["descriptors"], what)
        return state
    except Exception:
        for fd in descriptors:
            os.close(fd)
        raise


def _check_identities(state: CprState, recorded: list[list[int]], names: tuple[str, ...]) -> None:
    if len(recorded) != len(state.fds):
        raise StateError(
            f"the hand-over has {len(state.fds)} descriptors, and says what {len(recorded)} are"
        )
    for (name, id, fd), wanted in zip(state.fds, recorded, strict=True):
        for what, was, now in zip(names, wanted, identify(fd), strict=False):
            if was != now:
                raise StateError(
                    f"CPR fd '{name}' id {id} is not what was handed over: its {what} is {now:#x} "
                    f"in place of {was:#x}"
                )
