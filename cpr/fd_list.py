"""The descriptors of a CPR state, found without reading the rest: before anything is imported.

`os` is not imported here, for it is a fifth of Python's start; state/cpr_state.py has the format.
"""

from __future__ import annotations

import posix

ENVIRONMENT_NAME = "QEMU_CPR_EXEC_STATE"
HEADER_SIZE = 8  # magic and version
MAX_SIZE = 1 << 20


def read() -> bytes:
    """The CPR state that the environment names; nothing where there is none."""
    try:
        fd = int(posix.environ[ENVIRONMENT_NAME.encode()])
        return posix.pread(fd, min(posix.fstat(fd).st_size, MAX_SIZE), 0)
    except (KeyError, ValueError, OSError):
        return b""


def entries(state: bytes) -> list[tuple[bytes, int, int]]:
    """(name, id, fd) of each preserved descriptor; those before the first that is cut short."""
    found = []
    at = HEADER_SIZE
    while state[at : at + 1] == b"\1":
        end = at + 5 + int.from_bytes(state[at + 1 : at + 5], "big")
        if end + 8 > len(state):
            break
        id, fd = state[end : end + 4], state[end + 4 : end + 8]
        number = int.from_bytes(fd, "big", signed=True)
        found.append((state[at + 5 : end - 1], int.from_bytes(id, "big", signed=True), number))
        at = end + 8
    return found
