"""The page that both images see (struct cpr_live_page of _native/guard.h), without the C part."""

from __future__ import annotations

import errno
import mmap
import os

from cpr.live import sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1  # CPR_LIVE_VERSION
SIZE = 48  # bytes of struct cpr_live_page
FIRST = 40  # CPR_LIVE_PAGE_FIRST


class _Fields:
    """struct cpr_live_page over the mapping."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._words = memoryview(memory)[:FIRST].cast("I")
        self._times = memoryview(memory)[:FIRST].cast("Q")

    def release(self) -> None:
        self._words.release()
        self._times.release()


def _field(view: str, index: int) -> Any:
    return property(
        lambda self: getattr(self, view)[index],
        lambda self, value: getattr(self, view).__setitem__(index, value),
    )


for _view, _index, _name in (
    ("_words", 0, "version"),
    ("_words", 1, "hold"),
    ("_words", 2, "guard_pid"),
    ("_words", 3, "ended"),
    ("_times", 2, "began_ns"),
    ("_times", 3, "stopped_ns"),
    ("_times", 4, "exec_ns"),
):
    setattr(_Fields, _name, _field(_view, _index))


class Page:
    """The page that both images see; owns its descriptor and its mapping until `close`."""

    def __init__(self, fd: int = -1) -> None:
        """A new one, or the one of `fd`, which becomes this object's.  Raises OSError."""
        self.fd = sealed.create_sized("cpr-live", SIZE) if fd < 0 else fd
        try:
            if os.fstat(self.fd).st_size < FIRST:
                raise OSError(errno.EINVAL, "the page of the update is too small")
            self._memory = mmap.mmap(self.fd, 0)
        except OSError:
            if fd < 0:
                os.close(self.fd)
            raise
        fields: Any = _Fields(self._memory)
        self.struct = fields
        if fd < 0:
            fields.version = VERSION

    @property
    def score_before(self) -> str:
        """As of guard.Page."""
        return bytes(self._memory[FIRST:SIZE]).partition(b"\0")[0].decode()

    @score_before.setter
    def score_before(self, score: str) -> None:
        self._memory[FIRST:SIZE] = score.encode().ljust(SIZE - FIRST, b"\0")

    def close(self) -> None:
        self.struct.release()
        self.struct = None
        self._memory.close()
        os.close(self.fd)
