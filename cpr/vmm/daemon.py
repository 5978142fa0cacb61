"""The process around a VMM: -daemonize, -pidfile, and the signals that end it."""

from __future__ import annotations

import fcntl
import os
import signal
import sys

from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.vmm.process import Vmm

READY = b"\0"


def daemonize() -> Callable[[], None]:
    """Forks into the background; the parent exits when the child calls what this returns.

    The parent's exit status is 0 then, or 1 if the child ends before.  To be called before
    anything is opened or any thread started.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) == READY else 1)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        os.write(writer, READY)
        os.close(writer)

    return ready


def write_pidfile(path: str) -> Callable[[], None]:
    """Writes this PID to `path` and locks the file; returns what removes it again.

    Raises ConfigError where another process holds it.
    """
    try:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot create PID file: Could not create '{path}': {error.strerror}"
        ) from None
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"cannot create PID file: Cannot lock '{path}': {error.strerror}: is it another VMM's?"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())

    def remove() -> None:
        os.unlink(path)
        os.close(fd)

    return remove


def watch_signals(vmm: Vmm) -> None:
    """Makes SIGINT, SIGTERM and SIGHUP end the VM in an orderly way, on the main loop."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def on_wakeup(events: int) -> None:
        for number in os.read(reader, 64):
            if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                print(f"cpr-vmm: terminating on signal {number}", file=sys.stderr)
                vmm.quit("host-signal")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    vmm.loop.watch(reader, 1, on_wakeup)
