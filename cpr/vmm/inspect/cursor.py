"""A place in the bytes of a file, and what is raised when they are wrong there."""

from __future__ import annotations

import mmap
from typing import NamedTuple

from cpr.errors import StateError
from cpr.state.reader import EndOfStream

Data = bytes | mmap.mmap


class Flaw(NamedTuple):
    """Something wrong in a file: the offset in bytes from its beginning, and a sentence."""

    offset: int
    text: str

    def __str__(self) -> str:
        return f"offset {self.offset} ({self.offset:#x}): {self.text}"


class Damage(StateError):
    """A flaw after which the rest of the file cannot be understood."""

    def __init__(self, offset: int, text: str) -> None:
        super().__init__(text)
        self.flaw = Flaw(offset, text)


class Cursor:
    """A Reader of `data` that knows its offset, and how many bytes it was `missing` at the end.

    `place` and `place_offset` say what is being read and where it begins, for the text about a
    file that is cut short there.
    """

    __slots__ = ("data", "missing", "offset", "place", "place_offset", "values")

    def __init__(self, data: Data, offset: int = 0) -> None:
        self.data = data
        self.offset = offset
        self.missing = 0
        self.values = 0  # how many have been decoded
        self.enter("the file")

    def enter(self, place: str, offset: int | None = None) -> None:
        """What is read from now on belongs to `place`, which begins here or at `offset`."""
        self.place = place
        self.place_offset = self.offset if offset is None else offset

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes.  Raises EndOfStream if there are fewer."""
        begin = self.offset
        self.skip(size)
        return self.data[begin : self.offset]

    def skip(self, size: int) -> None:
        """Leaves `size` bytes out.  Raises EndOfStream if there are fewer."""
        missing = size - self.left()
        if missing > 0:
            self.missing = missing
            raise EndOfStream
        self.offset += size

    def peek(self, size: int) -> bytes:
        """`size` bytes, or for 1 maybe none at the end of the file, without taking them.

        Raises EndOfStream for more than one that are not there: a loader lets the header of a
        subsection pass that is cut, and stumbles later.
        """
        begin = self.offset
        self.skip(size if size > 1 else 0)
        self.offset = begin
        return self.data[begin : begin + size]

    def integer(self, size: int) -> int:
        """A big-endian unsigned integer of `size` bytes."""
        return int.from_bytes(self.read(size), "big")

    def name(self) -> str:
        """A u8 length and as many bytes of a name."""
        return self.read(self.integer(1)).decode(errors="replace")

    def left(self) -> int:
        return len(self.data) - self.offset

    def flaw(self, error: StateError) -> Flaw:
        """The flaw that `error`, raised while reading from here, stands for."""
        if isinstance(error, Damage):
            return error.flaw
        if self.missing:
            return Flaw(
                len(self.data),
                f"the file ends {self.missing} or more bytes too early, inside {self.place} "
                f"that begins at offset {self.place_offset} ({self.place_offset:#x})",
            )
        return Flaw(self.place_offset, str(error))
