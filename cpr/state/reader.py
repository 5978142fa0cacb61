"""Where bytes of a state come from, and what is raised when they are wrong or too few."""

from __future__ import annotations

from errno import EINVAL, EIO

from cpr.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Reader(Protocol):
        """What VMStateDescription.decode takes its bytes from."""

        def read(self, size: int) -> bytes:
            """Exactly `size` bytes.  Raises EndOfStream if there are fewer."""

        def peek(self, size: int) -> bytes:
            """Up to `size` bytes, without taking them; fewer only at the end of the stream."""


class StreamError(StateError):
    """A stream that cannot be loaded.

    `errno` is the one whose text QEMU puts before this error's own, and `stderr` holds the lines
    that QEMU prints on stderr by themselves before it reports the error.
    """

    def __init__(self, text: str, errno: int = EINVAL, stderr: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.errno = errno
        self.stderr = stderr


class EndOfStream(StreamError):
    """The stream ended where more bytes were expected."""

    def __init__(self) -> None:
        super().__init__(f"stream error: {-EIO}", EIO)


class LoadError(StreamError):
    """A section without a VMStateDescription, such as 'ram', failed to load with `errno`."""

    def __init__(self, errno: int, *stderr: str) -> None:
        super().__init__(f"ret: {-errno}", errno, stderr)


class BytesReader:
    """A Reader of `data`, from its first byte."""

    __slots__ = ("data", "offset")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def read(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self.data):
            raise EndOfStream
        piece = self.data[self.offset : end]
        self.offset = end
        return piece

    def peek(self, size: int) -> bytes:
        return self.data[self.offset : self.offset + size]
