"""The file chardev: output into a file, as with -chardev file,path=…; there is no input."""

from __future__ import annotations

import os

from cpr.chardev.stream import FdChardev
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.mainloop import MainLoop
    from cpr.state.connections import Kept


class FileChardev(FdChardev):
    """Truncates the file unless `append`; one that is kept goes on where it was.

    Raises ConfigError where the file cannot be opened.
    """

    backend = "file"

    def __init__(
        self,
        label: str,
        loop: MainLoop,
        path: str,
        append: bool,
        kept: Kept,
        may_wait: bool = True,
    ) -> None:
        """A FIFO's reader is waited for where it `may_wait`."""
        super().__init__(label, loop)
        self._path = path
        if not path:
            raise ConfigError("chardev: file: no filename given")
        fd = kept.take("file")
        self.attach_fds(-1, fd if fd >= 0 else _open(path, append, may_wait))
        self.adopt_output(kept)

    @property
    def where(self) -> dict[str, str | bool]:
        return {"path": self._path}

    def save(self) -> Kept:
        kept = super().save()
        if self.out_fd >= 0:
            kept.fds["file"] = self.out_fd
        return kept


def _open(path: str, append: bool, may_wait: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    flags |= 0 if may_wait else os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        raise ConfigError(f"Could not open '{path}': {error.strerror}") from None
    os.set_blocking(fd, False)
    return fd
