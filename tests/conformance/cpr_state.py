"""The bytes of the CPR state, good ones and damaged ones.

u32 0x51435052 'QCPR', u32 1
list of { u32 length, name, NUL; i32 id; i32 fd }
u8 5, u8 21, 'CprState/vfio devices', u32 1, an empty list
list = a byte 1 before each element, a byte 0 at the end
"""

from __future__ import annotations

import struct

MAGIC = 0x51435052
SUBSECTION = b"CprState/vfio devices"

Entry = tuple[str, int, int]
"""The name, id and descriptor number of a preserved fd."""


def encode(
    entries: list[Entry],
    magic: int = MAGIC,
    version: int = 1,
    subsection: bool = True,
    terminator: bytes = b"\0",
) -> bytes:
    """The state with `entries`; their names get `terminator`."""
    parts = [struct.pack(">II", magic, version)]
    parts += [encode_entry(*entry, terminator) for entry in entries]
    parts.append(b"\0")
    if subsection:
        parts.append(bytes([5, len(SUBSECTION)]) + SUBSECTION + struct.pack(">IB", 1, 0))
    return b"".join(parts)


def encode_entry(name: str, id: int, fd: int, terminator: bytes = b"\0") -> bytes:
    raw = name.encode() + terminator
    return struct.pack(">BI", 1, len(raw)) + raw + struct.pack(">ii", id, fd)


def decode(data: bytes, fd_size: int = 4) -> list[Entry]:
    """The entries of a good state.  Raises ValueError for anything else.

    `fd_size` is 1 for what comes over a socket: a blank then stands for each descriptor.
    """
    magic, version = struct.unpack_from(">II", data)
    if (magic, version) != (MAGIC, 1):
        raise ValueError(f"magic {magic:x}, version {version}")
    entries: list[Entry] = []
    at = 8
    while data[at] == 1:
        (length,) = struct.unpack_from(">I", data, at + 1)
        name = data[at + 5 : at + 5 + length]
        at += 5 + length
        (id,) = struct.unpack_from(">i", data, at)
        fd = data[at + 4 : at + 4 + fd_size]
        at += 4 + fd_size
        if name[-1:] != b"\0" or (fd_size == 1 and fd != b" "):
            raise ValueError(f"entry {name!r} with fd {fd!r}")
        entries.append((name[:-1].decode(), id, int.from_bytes(fd, "big")))
    if data[at:] != encode([])[8:]:
        raise ValueError(f"after the list comes {data[at:]!r}")
    return entries
