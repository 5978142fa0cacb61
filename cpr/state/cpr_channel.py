"""The CPR state as cpr-transfer sends it: over a unix socket, descriptors beside the bytes.

It is the state of cpr_state, but in place of each descriptor's number there is one byte 0x20 that
carries the descriptor itself (SCM_RIGHTS).  One message per descriptor, the first with the header
in front; the last has the end of the list and the rest, and no descriptor.
"""

from __future__ import annotations

from cpr.errors import StateError
from cpr.state.cpr_state import CprState, name_from_state, name_to_state
from cpr.state.reader import BytesReader
from cpr.state.vmstate import VMStateDescription, i32, u32, vbuffer

HEADER_SIZE = 8
ELEMENT = b"\1"
CARRIER = b" "

VMSTATE_ELEMENT = VMStateDescription(
    "cpr fd", 1, 1, (u32("namelen"), vbuffer("name", "namelen"), i32("id"))
)


def messages(state: CprState) -> list[tuple[bytes, int]]:
    """The messages in their order, each with the descriptor that it carries, or -1 for none."""
    rest = CprState([], state.vfio_devices).encode()
    head, tail = rest[:HEADER_SIZE], rest[HEADER_SIZE:]
    result = []
    for name, id, fd in state.fds:
        element = VMSTATE_ELEMENT.encode({**name_to_state(name), "id": id})
        result.append((head + ELEMENT + element + CARRIER, fd))
        head = b""
    return [*result, (head + tail, -1)]


def decode(data: bytes, descriptors: list[int]) -> CprState:
    """The state whose bytes are `data` and whose descriptors came in this order.

    Raises StateError; the descriptors stay the caller's in any case.
    """
    CprState.decode(data[:HEADER_SIZE] + b"\0")  # the header's own errors come first
    reader = BytesReader(data[HEADER_SIZE:])
    fds: list[tuple[str, int, int]] = []
    while reader.read(1) == ELEMENT:
        state = VMSTATE_ELEMENT.decode(reader, VMSTATE_ELEMENT.version_id)
        reader.read(len(CARRIER))
        name = name_from_state(state)
        if len(fds) == len(descriptors):
            raise StateError(f"CPR fd '{name}' id {state['id']} came without its descriptor")
        fds.append((name, state["id"], descriptors[len(fds)]))
    if len(fds) < len(descriptors):
        raise StateError(f"{len(descriptors) - len(fds)} descriptors came without a name")
    rest = CprState.decode(data[:HEADER_SIZE] + b"\0" + reader.data[reader.offset :])
    return CprState(fds, rest.vfio_devices)
