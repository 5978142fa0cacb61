"""What the user names: a file, a process, or stdin."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

from cpr.errors import CprError
from cpr.state import cpr_state
from cpr.state import stream as framing
from cpr.vmm.inspect import cpr_state as states
from cpr.vmm.inspect import stream as streams
from cpr.vmm.inspect.cpr_state import State
from cpr.vmm.inspect.cursor import Data, Flaw
from cpr.vmm.inspect.items import Stream
from cpr.vmm.inspect.process import Process

STDIN = "-"
MAGICS = {
    cpr_state.MAGIC.to_bytes(4, "big"): State.kind,
    framing.MAGIC.to_bytes(4, "big"): Stream.kind,
}
MAPPED_FROM = 16 << 20  # bytes; smaller files are read, and cannot shrink under the reader's feet
PROC_FD = re.compile(r"/proc/(\d+)/fd/\d+")


@dataclass
class Unknown:
    """A file that is neither a CPR state nor a migration stream."""

    kind: ClassVar[None] = None
    data: Data
    offset: int
    flaws: list[Flaw]

    def select(self, selected: Callable[[str], bool]) -> int:
        """How many parts have a name that is `selected`: none."""
        return 0

    def to_json(self, with_fields: bool) -> dict[str, object]:
        return {"kind": self.kind, "size": len(self.data) - self.offset}


Found = State | Stream | Unknown


@dataclass
class Source:
    """The bytes to inspect; `process` is the one whose descriptors a CPR state names, if known."""

    label: str
    data: Data
    process: Process | None = None


class NoState(CprError):
    """`process` has no memfd of a CPR state."""

    def __init__(self, process: Process) -> None:
        self.process = process
        super().__init__(
            f"process {process.pid} has no CPR state: no descriptor in /proc/{process.pid}/fd is a "
            f"memfd named {cpr_state.STATE_NAME}, {_variable(process)}. The memfd is there from "
            "'migrate' until the new image has loaded it"
        )


def open_source(operand: str) -> Source:
    """The bytes of a file's path, of a PID's state memfd, or of stdin for '-'.

    Raises NoState for a process without a state, CprError for what cannot be read.
    """
    if operand == STDIN:
        return Source("stdin", _copy(sys.stdin.buffer))
    if operand.isascii() and operand.isdigit():
        process = Process(int(operand))
        found = process.states()
        if not found:
            raise NoState(process)
        state, *older = found
        label = f"process {operand} descriptor {state.fd} inode {state.inode}"
        if older:
            label += f" (the one written last; there is also {', '.join(str(e.fd) for e in older)})"
        return Source(label, _read(process.path(state.fd)), process)
    match = PROC_FD.fullmatch(operand)
    return Source(operand, _read(operand), Process(int(match[1])) if match else None)


def inspect(source: Source, offset: int = 0, keep_places: bool = False) -> Found:
    """What the magic at `offset` says that it is, inspected.

    Raises CprError only where the process of `source` cannot be looked at.
    """
    data = source.data
    magic = data[offset : offset + 4]
    kind = MAGICS.get(magic)
    if kind == State.kind:
        return states.inspect(data, offset, source.process)
    if kind == Stream.kind:
        return streams.inspect(data, offset, keep_places)
    if offset >= len(data):
        text = f"there is nothing at offset {offset}" if data else "the file is empty"
        flaw = Flaw(len(data), text)
    elif any(each.startswith(magic) for each in MAGICS):
        flaw = Flaw(len(data), f"the file ends inside the magic that begins at offset {offset}")
    else:
        names = " nor ".join(f"{kind} ('{magic.decode()}')" for magic, kind in MAGICS.items())
        flaw = Flaw(offset, f"magic {magic.hex()}: neither {names}")
    return Unknown(data, offset, [flaw])


def _read(path: str) -> Data:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                raise CprError(f"{path}: it is a device, not a file")
            if not stat.S_ISREG(status.st_mode):
                return _copy(file)
            if status.st_size < MAPPED_FROM:
                return file.read()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CprError(f"Could not open '{path}': {error.strerror}") from None


def _copy(file: BinaryIO) -> Data:
    """All of a pipe, in a file that goes away by itself, since it may hold all of a guest's RAM."""
    with tempfile.TemporaryFile() as spool:
        shutil.copyfileobj(file, spool)
        spool.flush()
        return mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) if spool.tell() else b""


def _variable(process: Process) -> str:
    value = process.state_variable()
    if value is None:
        return f"and it was started without {cpr_state.STATE_NAME} in its environment"
    return f"though it was started with {cpr_state.STATE_NAME}={value}; that one is closed by now"
