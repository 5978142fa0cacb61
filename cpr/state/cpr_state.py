"""CprState: what an exec carries over besides the migration stream, byte for byte as QEMU's.

    u32 0x51435052 'QCPR', u32 1
    the preserved fds: a list of { u32 length, name, NUL; i32 id; i32 fd }
    u8 5, u8 21, 'CprState/vfio devices', u32 1
    the VFIO devices: a list of { u32 length, name, NUL; i32 devid; u32 ioas_id; u32 hwpt_id }
    list = a byte 1 before each element, a byte 0 at the end

The lengths count the NUL.  A reader takes a state without the subsection, and leaves alone what
comes after it.
"""

from __future__ import annotations

import struct

from cpr.errors import StateError
from cpr.state.reader import BytesReader
from cpr.state.vmstate import VMStateDescription, i32, qlist, u32, vbuffer

MAGIC = 0x51435052
VERSION = 1

STATE_NAME = "QEMU_CPR_EXEC_STATE"
"""The name of the memfd that holds the state, and of the variable that holds its number."""

REMEDY = f"without {STATE_NAME} in the environment the VMM starts the guest afresh"

VMSTATE_FD = VMStateDescription(
    "cpr fd", 1, 1, (u32("namelen"), vbuffer("name", "namelen"), i32("id"), i32("fd"))
)

VMSTATE_VFIO_DEVICE = VMStateDescription(
    "cpr vfio device",
    1,
    1,
    (
        u32("namelen"),
        vbuffer("name", "namelen"),
        i32("devid"),
        u32("ioas_id"),
        u32("hwpt_id"),
    ),
)

VMSTATE_VFIO_DEVICES = VMStateDescription(
    "CprState/vfio devices", 1, 1, (qlist("vfio_devices", VMSTATE_VFIO_DEVICE),)
)

VMSTATE_CPR_STATE = VMStateDescription(
    "CprState", 1, 1, (qlist("fds", VMSTATE_FD),), subsections=(VMSTATE_VFIO_DEVICES,)
)


class VfioDevice:
    """What the new image must know of a VFIO device bound to an iommufd.

    Its name (the PCI address), the device's id in the iommufd, and the ids of the IOAS and of the
    hardware page table that it is attached to.
    """

    __slots__ = ("devid", "hwpt_id", "ioas_id", "name")

    def __init__(self, name: str, devid: int, ioas_id: int, hwpt_id: int) -> None:
        self.name = name
        self.devid = devid
        self.ioas_id = ioas_id
        self.hwpt_id = hwpt_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VfioDevice) and self.to_state() == other.to_state()

    def __repr__(self) -> str:
        return f"VfioDevice({self.name!r}, {self.devid}, {self.ioas_id}, {self.hwpt_id})"

    def to_state(self) -> dict:
        """The state by VMSTATE_VFIO_DEVICE."""
        return {
            **name_to_state(self.name),
            "devid": self.devid,
            "ioas_id": self.ioas_id,
            "hwpt_id": self.hwpt_id,
        }


class CprState:
    """The preserved fds, each a (name, id, fd), and the VFIO devices, both in their order.

    The fds are numbers only: this class neither opens nor closes any.
    """

    __slots__ = ("fds", "vfio_devices")

    def __init__(self, fds: list[tuple[str, int, int]], vfio_devices: list[VfioDevice]) -> None:
        self.fds = fds
        self.vfio_devices = vfio_devices

    def encode(self) -> bytes:
        """The bytes of the state.

        Raises ValueError for a name with a NUL in it, struct.error for a number out of range.
        """
        state = {
            "fds": [{**name_to_state(name), "id": id, "fd": fd} for name, id, fd in self.fds],
            VMSTATE_VFIO_DEVICES.name: {
                "vfio_devices": [device.to_state() for device in self.vfio_devices]
            },
        }
        return struct.pack(">II", MAGIC, VERSION) + VMSTATE_CPR_STATE.encode(state)

    @classmethod
    def decode(cls, data: bytes) -> CprState:
        """The state that `data` begins with.  Raises StateError, and nothing else."""
        magic, version = struct.unpack(">II", data[:8].ljust(8, b"\0"))
        if magic != MAGIC:
            raise StateError(f"Not a migration stream (bad magic {magic:x})")
        if version != VERSION:
            raise StateError(f"Unsupported migration stream version {version}")
        state = VMSTATE_CPR_STATE.decode(BytesReader(data[8:]), VMSTATE_CPR_STATE.version_id)
        devices = state.get(VMSTATE_VFIO_DEVICES.name, {"vfio_devices": []})["vfio_devices"]
        return cls(
            [_fd_from_state(each) for each in state["fds"]],
            [
                VfioDevice(name_from_state(each), each["devid"], each["ioas_id"], each["hwpt_id"])
                for each in devices
            ],
        )


def _fd_from_state(state: dict) -> tuple[str, int, int]:
    name, id, fd = name_from_state(state), state["id"], state["fd"]
    if fd < 0:
        raise StateError(f"CPR fd '{name}' id {id} has the negative descriptor {fd}; {REMEDY}")
    return name, id, fd


def name_from_state(state: dict) -> str:
    """The name up to its NUL; bytes that are not UTF-8 are kept as surrogates."""
    raw, terminator, _ = state["name"].partition(b"\0")
    name: str = raw.decode(errors="surrogateescape")
    if not terminator:
        raise StateError(f"CPR name {name!r} of {len(raw)} bytes has no NUL at its end; {REMEDY}")
    return name


def name_to_state(name: str) -> dict:
    raw = name.encode(errors="surrogateescape")
    if b"\0" in raw:
        raise ValueError(f"CPR name {name!r} has a NUL in it")
    return {"namelen": len(raw) + 1, "name": raw + b"\0"}
