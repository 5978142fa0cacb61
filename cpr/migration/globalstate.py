"""What a stream says of the machine as a whole: its run state, its RAMBlocks, its UUID."""

from __future__ import annotations

from cpr import runstate
from cpr.state import ram_section
from cpr.state.vmstate import VMStateDescription, buffer, u8, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.machine import Machine

RUNSTATE_SIZE = 32

VMSTATE_GLOBALSTATE = VMStateDescription(
    "globalstate",
    1,
    1,
    (
        u32("size"),
        buffer("runstate", RUNSTATE_SIZE),
        u8("has_vm_was_suspended"),
        u8("vm_was_suspended"),
        buffer("unused", 66),
    ),
)


def encode_runstate(old_state: str, was_suspended: bool) -> dict:
    """The globalstate section of a machine that was in `old_state` before it was stopped."""
    text = old_state.encode() + b"\0"
    return {
        "size": len(text),
        "runstate": text.ljust(RUNSTATE_SIZE, b"\0"),
        "has_vm_was_suspended": 1,
        "vm_was_suspended": int(was_suspended or old_state == runstate.SUSPENDED),
        "unused": bytes(66),
    }


def decode_runstate(machine: Machine, state: dict | None) -> str:
    """The source's run state; whether it slept before it was stopped goes to the machine."""
    if state is None:
        return runstate.RUNNING
    machine.was_suspended = bool(state["has_vm_was_suspended"] and state["vm_was_suspended"])
    text: str = state["runstate"].split(b"\0", 1)[0].decode(errors="replace")
    return text


def list_blocks(machine: Machine) -> list[ram_section.Block]:
    """The blocks for the ram section, with the guest-physical address of each."""
    addresses = {s.block.idstr: s.start for s in reversed(machine.memory.sections) if not s.offset}
    return [
        ram_section.Block(b.idstr, b.size, b.max_length, addresses.get(b.idstr))
        for b in machine.blocks
    ]


def encode_uuid(machine: Machine) -> bytes | None:
    """The 16 bytes of -uuid."""
    text = machine.config.uuid
    return bytes.fromhex(text.replace("-", "")) if text else None
