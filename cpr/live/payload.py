"""What goes over besides descriptors: JSON, and bytes in one memfd to which it points."""

from __future__ import annotations

import json
import os
from typing import Any

from cpr.live.errors import UpdateError

JSON, BYTES, NOTHING = "json", "bytes", "nothing"


class Writer:
    """Collects bytes; `fd` is a memfd, which this owns until `close`."""

    def __init__(self) -> None:
        """Raises UpdateError where there is no descriptor or no memory."""
        self._size = 0
        try:
            self.fd = os.memfd_create("cpr-live-state")
        except OSError as error:
            raise UpdateError(f"memfd of the state: {error.strerror}") from None

    def add(self, data: bytes | bytearray | memoryview) -> list[int]:
        """Where these bytes are, for the JSON.  Raises UpdateError."""
        view = memoryview(data)
        can_be_cast = view.nbytes and view.c_contiguous
        view = view.cast("B") if can_be_cast else memoryview(view.tobytes())
        place = [self._size, len(view)]
        try:
            while view:
                written = os.pwrite(self.fd, view, self._size)
                self._size += written
                view = view[written:]
        except OSError as error:
            raise UpdateError(f"the state of {place[1]} bytes: {error.strerror}") from None
        return place

    def add_value(self, value: Any, what: str) -> dict[str, Any]:
        """The same for bytes, None, or what JSON can carry.  Raises UpdateError naming `what`."""
        if value is None:
            return {"kind": NOTHING}
        if isinstance(value, (bytes, bytearray, memoryview)):
            return {"kind": BYTES, "place": self.add(value)}
        try:
            text = json.dumps(value).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UpdateError(f"JSON cannot carry {what}: {error}") from None
        return {"kind": JSON, "place": self.add(text)}

    def close(self) -> None:
        os.close(self.fd)


class Reader:
    """The other side; owns the descriptor until `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def get(self, place: list[int]) -> bytes:
        offset, size = place
        pieces = []
        while size and (piece := os.pread(self._fd, size, offset)):
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def get_value(self, described: dict[str, Any], default: Any = None) -> Any:
        kind = described["kind"]
        if kind == NOTHING:
            return default
        data = self.get(described["place"])
        return data if kind == BYTES else json.loads(data)

    def close(self) -> None:
        os.close(self._fd)
