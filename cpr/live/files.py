"""File objects that go over: what makes one like it of the same descriptor."""

from __future__ import annotations

import gc
import io
import os
from typing import IO, Any

from cpr.live.errors import PreserveError

NEWLINES = ("", "\n", "\r", "\r\n")


def check(name: str, file: Any) -> None:
    """Raises PreserveError for a file whose buffer cannot be given back, and is not to be lost."""
    if file.readable() and not isinstance(file, io.RawIOBase) and not file.seekable():
        raise PreserveError(
            f"'{name}' is a pipe, a terminal or the like, and what the file object has read ahead "
            "would be lost: preserve its descriptor with live.fd, or open it with buffering=0"
        )


def describe(file: Any) -> dict[str, Any]:
    """The keywords of `build`, for JSON; of a text file when it has been synchronized."""
    name = file.name if hasattr(file, "name") else None
    found: dict[str, Any] = {"name": os.fsdecode(name) if isinstance(name, (str, bytes)) else None}
    if isinstance(file, io.TextIOWrapper):
        return {
            **found,
            "mode": _plain_mode(file.buffer),
            "encoding": file.encoding,
            "errors": file.errors,
            "newline": _newline_of(file),
            "line_buffering": file.line_buffering,
            "write_through": file.write_through,
        }
    buffering = 0 if isinstance(file, io.RawIOBase) else -1
    return {**found, "mode": _plain_mode(file) + "b", "buffering": buffering}


def build(fd: int, how: dict[str, Any]) -> IO[Any]:
    """A file of the descriptor, which is the file's.  Raises OSError and ValueError."""
    words = dict(how)
    name, place = words.pop("name", None), words.pop("place", None)
    text = {key: words.pop(key) for key in ("line_buffering", "write_through") if key in words}
    file: IO[Any] = open(fd if name is None else name, opener=lambda *_: fd, **words)  # noqa: SIM115
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(**text)
    move(file, place)
    return file


def place_of(file: IO[Any]) -> int | None:
    """Where a file stands that `synchronize` has been given, if its descriptor cannot tell that.

    A decoder may be in the middle of something: a line's end of two characters, a byte order.
    """
    if not file.readable() or not file.seekable():
        return None
    place = file.tell()
    return None if place == os.lseek(file.fileno(), 0, os.SEEK_CUR) else place


def move(file: IO[Any], place: int | None) -> None:
    """The inverse of `place_of`; moves the descriptor, too.  Raises OSError."""
    if place is not None:
        file.seek(place)


def synchronize(file: IO[Any]) -> None:
    """Writes what a file object has buffered, and puts the descriptor where the object stands."""
    if file.writable():
        file.flush()
    if file.readable() and file.seekable():
        place = file.tell()
        file.seek(0, os.SEEK_END)  # a seek within the buffer would not move the descriptor
        file.seek(place)


def _plain_mode(file: Any) -> str:
    """A mode that neither truncates nor creates; O_APPEND is the open file's own."""
    readable, writable = file.readable(), file.writable()
    return "r+" if readable and writable else "w" if writable else "r"


def _newline_of(file: io.TextIOWrapper) -> str | None:
    """The `newline` that it was opened with: no attribute has it, but the file refers to it.

    The text that has been read and not returned, the only other of these that it may refer to, is
    gone when it has been synchronized.
    """
    found = [each for each in gc.get_referents(file) if isinstance(each, str)]
    return next((each for each in found if each in NEWLINES), None)
