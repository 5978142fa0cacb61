"""Chardev: the host's end of a serial port or a monitor, and `create`, which makes one.

Bytes go out by `write` or `try_write`, from any thread; neither waits for a peer that does not
read, and what is kept for it is bounded.  Bytes come in on the main loop, never more at once than
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


MAX_WAITING = 4 << 20
"""Bytes that may wait for a peer before another `write` is dropped; what one write brings over
this is kept whole."""

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
        self.writable: Callable[[], None] = _do_nothing

    def set_handlers(
        self,
        can_receive: Callable[[], int],
        receive: Callable[[bytes], None],
        event: Callable[[str], None],
        writable: Callable[[], None] | None = None,
    ) -> None:
        """Attaches the frontend; all are called on the main loop.

        `can_receive()` says how many bytes it takes now, `receive(data)` gives it at most as
        many, `event` is "opened" or "closed"; "opened" comes at once where a peer is there.
        `writable()` says that nothing waits for the peer any more, or that it has gone.
        """
        self.writable = writable or _do_nothing
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
        self.writable = _do_nothing

    @property
    def has_frontend(self) -> bool:
        return self.can_receive is not _no_room

    @property
    def waiting(self) -> int:
        """How many bytes wait for the peer."""
        return 0

    def write(self, data: bytes) -> None:
        """Sends `data`; from any thread, never blocks, keeps what does not go out at once.

        Where MAX_WAITING bytes wait already, `data` is dropped as a whole.
        """
        raise NotImplementedError

    def try_write(self, data: bytes) -> int:
        """Sends what of `data` goes out at once, and keeps nothing; returns how many bytes went.

        From any thread.  If that is not all, `writable` is called when there is room again.
        """
        self.write(data)
        return len(data)

    def accept_input(self) -> None:
        """Says that the frontend has room again; from any thread."""

    def flush(self, timeout_ns: int = 0) -> None:
        """Sends what waits, as far as that goes within `timeout_ns`; by default without waiting."""

    def take_fd(self) -> int:
        """A descriptor that the peer passed with SCM_RIGHTS, the caller's from now on; else -1."""
        return -1

    def exec_fds(self) -> list[int]:
        """The sockets that an exec closes for good, as QEMU's does: the peer sees it at once."""
        return []

    def reopen(self) -> None:
        """Goes on without those of `exec_fds`, which are closed.  Raises ConfigError."""

    def expect_another(self) -> None:
        """From now on a new client takes the place of the one that is there, which knew the VMM
        under another PID and may have given it up."""

    def describe(self) -> str:
        """What `info chardev` shows after filename=."""
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


def _do_nothing() -> None:
    pass
