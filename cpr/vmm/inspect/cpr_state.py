"""A CprState, entry by entry, and what each descriptor is in the process that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cpr.errors import StateError
from cpr.state.cpr_state import (
    VERSION,
    VMSTATE_CPR_STATE,
    VMSTATE_FD,
    VMSTATE_VFIO_DEVICE,
    VMSTATE_VFIO_DEVICES,
)
from cpr.state.vmstate import VMStateDescription
from cpr.vmm.inspect.cursor import Cursor, Damage, Data, Flaw
from cpr.vmm.inspect.process import Descriptor, Process

_HEADER_SIZE = 2 + len(VMSTATE_VFIO_DEVICES.name) + 4  # of the subsection


@dataclass
class Entry:
    """A preserved descriptor; `descriptor` is what it is in the process, None if not known."""

    offset: int
    name: str
    id: int
    fd: int
    descriptor: Descriptor | None = None

    def to_json(self) -> dict[str, Any]:
        known = self.descriptor.to_json() if self.descriptor else None
        return {**vars(self), "descriptor": known}


@dataclass
class Device:
    """A VFIO device bound to an iommufd."""

    offset: int
    name: str
    devid: int
    ioas_id: int
    hwpt_id: int


@dataclass
class State:
    """What an inspection of a CprState has found."""

    kind: ClassVar[str] = "CprState"
    data: Data
    offset: int = 0
    entries: list[Entry] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    flaws: list[Flaw] = field(default_factory=list)

    def select(self, selected: Callable[[str], bool]) -> int:
        """Keeps what has a name that is `selected`; returns how many."""
        self.entries = [entry for entry in self.entries if selected(entry.name)]
        self.devices = [device for device in self.devices if selected(device.name)]
        return len(self.entries) + len(self.devices)

    def to_json(self, with_fields: bool) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "size": len(self.data) - self.offset,
            "entries": [entry.to_json() for entry in self.entries],
            "vfio_devices": [vars(device) for device in self.devices],
        }


def inspect(data: Data, offset: int = 0, process: Process | None = None) -> State:
    """Reads the state that begins at `offset`; never raises for what is in it.

    Looks the descriptors up in `process`.  Raises KernelError where that is not allowed.
    """
    state = State(data, offset)
    cursor = Cursor(data, offset)
    try:
        _take(state, cursor)
    except StateError as error:
        state.flaws.append(cursor.flaw(error))
    _check_entries(state)
    if process is not None:
        _look_up(state, process)
    return state


def _take(state: State, cursor: Cursor) -> None:
    cursor.enter("the header")
    cursor.skip(4)
    version = cursor.integer(4)
    if version != VERSION:
        raise Damage(cursor.offset - 4, f"Unsupported migration stream version {version}")
    cursor.enter("the list of descriptors")
    for offset, each in _elements(cursor, VMSTATE_FD, "the entry of a descriptor"):
        name = _name(state, offset, each["name"])
        state.entries.append(Entry(offset, name, each["id"], each["fd"]))
    if not cursor.left():
        raise Damage(cursor.offset, f"the file ends here, without '{VMSTATE_VFIO_DEVICES.name}'")
    _take_subsection(state, cursor)
    if cursor.left():
        raise Damage(cursor.offset, f"{cursor.left()} bytes after the end of the state")


def _take_subsection(state: State, cursor: Cursor) -> None:
    begin = cursor.offset
    cursor.enter(f"the subsection '{VMSTATE_VFIO_DEVICES.name}'")
    found: dict = {}
    VMSTATE_CPR_STATE.decode_subsections(cursor, found)
    if VMSTATE_VFIO_DEVICES.name in found:
        again = Cursor(cursor.data, begin + _HEADER_SIZE)
        for offset, each in _elements(again, VMSTATE_VFIO_DEVICE, "the entry of a device"):
            name = _name(state, offset, each["name"])
            ids = each["devid"], each["ioas_id"], each["hwpt_id"]
            state.devices.append(Device(offset, name, *ids))


def _elements(
    cursor: Cursor, vmsd: VMStateDescription, what: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The elements of a list, each with its offset."""
    place, place_offset = cursor.place, cursor.place_offset
    while cursor.read(1) != b"\0":
        begin = cursor.offset - 1
        cursor.enter(what, begin)
        yield begin, vmsd.decode(cursor, vmsd.version_id)
        cursor.enter(place, place_offset)


def _name(state: State, offset: int, raw: bytes) -> str:
    name, terminator, _ = raw.partition(b"\0")
    text = name.decode(errors="backslashreplace")
    if not terminator:
        state.flaws.append(Flaw(offset, f"the name '{text}' has no NUL at its end"))
    return text


def _check_entries(state: State) -> None:
    """What a reader crashes on, or leaves out without a word."""
    seen = set()
    for entry in state.entries:
        what = f"'{entry.name}' id {entry.id}"
        if entry.fd < 0:
            state.flaws.append(Flaw(entry.offset, f"{what} has the negative descriptor {entry.fd}"))
        if (entry.name, entry.id) in seen:
            text = f"a second entry {what}: only the first is used"
            state.flaws.append(Flaw(entry.offset, text))
        seen.add((entry.name, entry.id))


def _look_up(state: State, process: Process) -> None:
    for entry in state.entries:
        entry.descriptor = process.descriptor(entry.fd)
        if entry.descriptor is None and entry.fd >= 0:
            state.flaws.append(
                Flaw(
                    entry.offset,
                    f"'{entry.name}' id {entry.id}: descriptor {entry.fd} is not open "
                    f"in process {process.pid}",
                )
            )
