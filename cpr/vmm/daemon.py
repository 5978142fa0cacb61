"""The process around a VMM: -daemonize, -pidfile, and signals."""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import errno
import fcntl
import os
import stat

from cpr.constants import INIT
from cpr.errors import ConfigError
from cpr.live import guard
from cpr.live.transaction import ENDING
from cpr.mainloop import READ
from cpr.report import error_report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.vmm.vmm import Vmm

READY = b"\0"
STRAY = (
    *(signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGUSR2),
    signal.SIGXCPU,
)
"""From the timers of a program that was this process before, say, or the soft RLIMIT_CPU, which
counts on over execs; children have them as ever."""
MOST_PID = 32  # bytes of a PID file that are looked at; more than a PID has


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


class Pidfile:
    """The file of -pidfile: has this process's PID, and is locked by it.

    A symbolic link there is replaced, and what it names stays as it is.  Owns the descriptor;
    `remove` is the inverse.
    """

    def __init__(self, path: str) -> None:
        """Raises ConfigError where the file cannot be opened, is another process's or no regular
        one, or has in it what is no PID.
        """
        try:
            self._path = os.path.abspath(path)
            self._fd = _open_pidfile(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot create PID file: Could not create '{path}': {_reason(error)}"
            ) from None
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.pread(self._fd, MOST_PID, 0)
            if found.strip() and not found.strip().isdigit():
                raise ConfigError(
                    f"cannot create PID file: '{path}' has in it what is no PID, and would be "
                    "lost: remove it, or name another file"
                )
            self._write()
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(
                f"cannot create PID file: Cannot lock '{path}': {error.strerror}: is it another "
                "VMM's?"
            ) from None
        except ConfigError:
            os.close(self._fd)
            raise

    def _write(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = f"{os.getpid()}\n".encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))

    def fileno(self) -> int:
        return self._fd

    def rewrite(self) -> None:
        """For another PID than before; a lock does not go over to a new process.

        A file that has gone is made again; one that is outside this process's root has not.
        """
        try:
            if not os.fstat(self._fd).st_nlink and not os.path.exists(self._path):
                new = _open_pidfile(self._path)
                os.dup2(new, self._fd, inheritable=False)
                os.close(new)
            self._write()
        except (OSError, ValueError) as error:
            error_report(f"cannot rewrite PID file '{self._path}': {_reason(error)}")

    def remove(self) -> None:
        """Unlinks the file, if it is still this one, and closes it."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                os.unlink(self._path)
        except OSError:
            pass
        os.close(self._fd)


def _open_pidfile(path: str) -> int:
    """Raises OSError, and ValueError for what would be lost in the end: a device, a FIFO."""
    flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP or not os.path.islink(path):
            raise
        os.unlink(path)
        fd = os.open(path, flags | os.O_EXCL, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("it is no regular file")
    return fd


def _reason(error: OSError | ValueError) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)


def reap_orphans() -> None:
    """Reaps the children that have ended, but for those that somebody here waits for."""
    from cpr.migration.child import starting, waited_for

    with starting:
        for pid in guard.children():
            if pid not in waited_for:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass  # a guard, which is waited for by its pidfd


class Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGQUIT: they end the VM in an orderly way, on its main loop.

    Before there is one they are blocked in a VMM that takes a guest over, so that they outlive what
    becomes of it; they end the start of another one, which may wait for a client or a source.
    No other one that may go astray ends a VM.
    As PID 1 of a container a VMM reaps orphans too: SIGCHLD tells of them.
    """

    def __init__(self, takes_over: bool) -> None:
        self._wait = takes_over
        self._has_come = False
        if takes_over:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*ENDING, *STRAY):
            signal.signal(number, self._on_signal)
        # Whoever has started this one may ignore it: no child's status could be known then.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _on_signal(self, number: int, frame: object) -> None:
        """All else is done where the wakeup descriptor is read."""
        if number not in ENDING:
            return
        self._has_come = True
        if not self._wait:
            error_report(f"terminating on signal {number}")
            raise SystemExit(1)

    def attach(self, vmm: Vmm) -> None:
        self._wait = True
        vmm.signal_has_come = lambda: self._has_come
        if os.getpid() == INIT:
            signal.signal(signal.SIGCHLD, self._on_signal)
            reap_orphans()

        def on_wakeup(events: int) -> None:
            for number in os.read(self._reader, 64):
                if number == signal.SIGCHLD:
                    reap_orphans()
                if number in ENDING:
                    error_report(f"terminating on signal {number}")
                    vmm.quit("host-signal")

        vmm.loop.watch(self._reader, READ, on_wakeup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
