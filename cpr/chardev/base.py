"""Chardev: the host's end of a serial port or a monitor, and `create`, which makes one.

Bytes go out by `write`, from any thread; bytes come in on the main loop, never more at once than
the frontend has said it has room for, and what it has no room for stays in the kernel: nothing is
lost while it waits, also not by an exec.  Every descriptor that a Chardev opens is close-on-exec
and its own until `close`.
"""

from __future__ import annotations

from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from cpr.mainloop import MainLoop

    class ChardevConfig(Protocol):
        """One -chardev: `options` has QEMU's option names without id; flags are bool or on|off."""

        id: str
        backend: str
        options: dict[str, Any]


OPENED = "opened"
CLOSED = "closed"


class Chardev:
    """A byte channel with one frontend.

    `connected` is true while somebody is at the other end; what is written meanwhile without a
    peer is dropped, as on a line that nobody is plugged into.
    """

    backend = ""

    def __init__(self, label: str, loop: MainLoop) -> None:
        self.label = label
        self.loop = loop
        self.connected = False
        self.can_receive: Callable[[], int] = _no_room
        self.receive: Callable[[bytes], None] = _ignore
        self.event: Callable[[str], None] = _ignore

    def set_handlers(
        self,
        can_receive: Callable[[], int],
        receive: Callable[[bytes], None],
        event: Callable[[str], None],
    ) -> None:
        """Attaches the frontend; all three are called on the main loop.

        `can_receive()` says how many bytes it takes now, `receive(data)` gives it at most as
        many, `event` is "opened" or "closed"; "opened" comes at once where a peer is there.
        """
        self.can_receive = can_receive
        self.receive = receive
        self.event = event
        if self.connected:
            event(OPENED)
        self.accept_input()

    def clear_handlers(self) -> None:
        """Detaches the frontend; input waits for the next one."""
        self.can_receive = _no_room
        self.receive = _ignore
        self.event = _ignore

    @property
    def has_frontend(self) -> bool:
        return self.can_receive is not _no_room

    def write(self, data: bytes) -> None:
        """Sends `data`; from any thread, never blocks, keeps what does not go out at once."""
        raise NotImplementedError

    def accept_input(self) -> None:
        """Says that the frontend has room again; from any thread."""

    def flush(self, timeout_ns: int) -> None:
        """Waits until all that was written is out, at most `timeout_ns`; call it before an exec."""

    def take_fd(self) -> int:
        """A descriptor that the peer passed with SCM_RIGHTS, the caller's from now on; else -1."""
        return -1

    def describe(self) -> str:
        """What `info chardev` shows behind filename=."""
        return self.backend

    def close(self) -> None:
        """The inverse of creating it: gives back terminal settings, paths and descriptors."""
        self.clear_handlers()


def create(config: ChardevConfig, loop: MainLoop, after_exec: bool = False) -> Chardev:
    """Makes the backend that `config` names; the caller closes it.

    `after_exec` says that this process came from an update, so that a terminal's settings are
    those of the old image and not what the user had.  Raises ConfigError, and then leaves
    nothing open.
    """
    label, options = config.id, config.options
    if config.backend == "null":
        from cpr.chardev.null import NullChardev

        return NullChardev(label, loop)
    if config.backend == "stdio":
        from cpr.chardev.stdio import StdioChardev

        return StdioChardev(label, loop, flag(options, "signal", True), after_exec)
    if config.backend == "file":
        from cpr.chardev.file import FileChardev

        return FileChardev(label, loop, options.get("path", ""), flag(options, "append", False))
    if config.backend == "pty":
        from cpr.chardev.pty import PtyChardev

        return PtyChardev(label, loop)
    if config.backend == "socket":
        from cpr.chardev.socket import SocketChardev, SocketOptions

        return SocketChardev(label, loop, SocketOptions(options))
    raise ConfigError(f"'{config.backend}' is not a valid char driver name")


def flag(options: dict[str, Any], name: str, default: bool) -> bool:
    """An on|off option.  Raises ConfigError for another value."""
    value = options.get(name, default)
    if isinstance(value, bool):
        return value
    if value not in ("on", "off"):
        raise ConfigError(f"Parameter '{name}' expects 'on' or 'off'")
    return bool(value == "on")


def _no_room() -> int:
    return 0


def _ignore(_: Any) -> None:
    pass
