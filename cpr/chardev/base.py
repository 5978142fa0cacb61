"""Chardev: the host's end of a serial port or a monitor, and `create`, which makes one.

Bytes go out by `write` or `try_write`, from any thread; neither waits for a peer that does not
read, and what is kept for it is bounded.  Bytes come in on the main loop, never more at once than
the frontend has said it has room for, and what it has no room for stays in the kernel: nothing is
lost while it waits, also not by an exec.  Every descriptor that a Chardev opens is close-on-exec
and its own until `close`.
"""

from __future__ import annotations

from _thread import RLock

from cpr.errors import ConfigError
from cpr.state.connections import Kept

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
    peer is dropped, as on a line that nobody is plugged into.  `cpr` is the option of that name,
    None where it is not given: True keeps the connection over late updates too, False over none.
    """

    backend = ""
    cpr: bool | None = None

    def __init__(self, label: str, loop: MainLoop) -> None:
        self.label = label
        self.loop = loop
        self.connected = False
        self.can_receive: Callable[[], int] = _no_room
        self.receive: Callable[[bytes], None] = _ignore
        self.event: Callable[[str], None] = _ignore
        self.writable: Callable[[], None] = _do_nothing
        self.input_lock = RLock()
        """Is held from where the frontend is asked for room until it has what was read."""

    def set_handlers(
        self,
        can_receive: Callable[[], int],
        receive: Callable[[bytes], None],
        event: Callable[[str], None],
        writable: Callable[[], None] | None = None,
        knows_peer: bool = False,
    ) -> None:
        """Attaches the frontend; all are called on the main loop.

        `can_receive()` says how many bytes it takes now, `receive(data)` gives it at most as
        many, `event` is "opened" or "closed"; "opened" comes at once where a peer is there that
        the frontend does not know yet.
        `writable()` says that nothing waits for the peer any more, or that it has gone.
        """
        self.writable = writable or _do_nothing
        self.can_receive = can_receive
        self.receive = receive
        self.event = event
        if self.connected and not knows_peer:
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

    def forget_exec_fds(self) -> None:
        """Those of `exec_fds` are closed, and their numbers anybody's; `reopen` comes next."""

    def reopen(self) -> None:
        """Goes on without those of `exec_fds`.  Raises ConfigError."""

    def on_update(self) -> None:
        """An update begins, which may keep the connection: who comes from now on comes anew."""

    def expect_another(self) -> None:
        """From now on a new client takes the place of the one that is there, which knew the VMM
        under another PID and may have given it up."""

    @property
    def where(self) -> dict[str, str | bool]:
        """The options that say what a connection is one to: it goes on where they are the same."""
        return {}

    def save(self) -> Kept:
        """What another image's chardev goes on with; the descriptors stay this one's."""
        return Kept({"backend": self.backend, "where": self.where, "connected": self.connected})

    def start_over(self) -> None:
        """Another image has talked to the peer meanwhile: what this one knows of it is old."""

    def describe(self) -> str:
        """What `info chardev` shows after filename=."""
        return self.backend

    def close(self) -> None:
        """The inverse of creating it: gives back terminal settings, paths and descriptors."""
        self.clear_handlers()


def create(
    config: ChardevConfig, loop: MainLoop, after_exec: bool = False, kept: Kept | None = None
) -> Chardev:
    """Makes the backend that `config` names; the caller closes it.

    `after_exec` says that this process came from an update, so that a terminal's settings are
    those of the old image and not what the user had.  `kept` is what the old image's chardev has
    saved, one that `fits`; its descriptors are the chardev's, or closed.  Raises ConfigError, and
    then leaves nothing open.
    """
    kept = kept or Kept({})
    try:
        chardev = _create(config, loop, after_exec, kept)
    finally:
        kept.close()
    if "cpr" in config.options:
        chardev.cpr = flag(config.options, "cpr", False)
    return chardev


def _create(config: ChardevConfig, loop: MainLoop, after_exec: bool, kept: Kept) -> Chardev:
    label, options = config.id, config.options
    if config.backend == "null":
        from cpr.chardev.null import NullChardev

        return NullChardev(label, loop)
    if config.backend == "stdio":
        from cpr.chardev.stdio import StdioChardev

        return StdioChardev(label, loop, flag(options, "signal", True), after_exec, kept)
    if config.backend == "file":
        from cpr.chardev.file import FileChardev

        path, append = options.get("path", ""), flag(options, "append", False)
        return FileChardev(label, loop, path, append, kept, not after_exec)
    if config.backend == "pty":
        from cpr.chardev.pty import PtyChardev

        return PtyChardev(label, loop, kept)
    if config.backend == "socket":
        from cpr.chardev.socket import SocketChardev, SocketOptions

        return SocketChardev(label, loop, SocketOptions(options), kept, not after_exec)
    raise ConfigError(f"'{config.backend}' is not a valid char driver name")


def fits(config: ChardevConfig, kept: Kept) -> bool:
    """Whether the chardev of `config` can go on with what another one has saved."""
    if kept.data.get("backend") != config.backend or not flag(config.options, "cpr", True):
        return False
    return all(_option(config, name, was) == was for name, was in kept.data["where"].items())


def _option(config: ChardevConfig, name: str, was: str | bool) -> str | bool:
    if isinstance(was, bool):
        return flag(config.options, name, False)
    return str(config.options.get(name, ""))


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
