"""The null chardev: takes everything, gives nothing."""

from __future__ import annotations

from cpr.chardev.base import Chardev

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.mainloop import MainLoop


class NullChardev(Chardev):
    backend = "null"

    def __init__(self, label: str, loop: MainLoop) -> None:
        super().__init__(label, loop)
        self.connected = True

    def write(self, data: bytes) -> None:
        pass
