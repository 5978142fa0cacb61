"""The command of an exec: address, and the pipe to or from it."""

from __future__ import annotations

import os
import select
import signal
from _thread import allocate_lock
from functools import partial

from cpr.errors import MigrationError
from cpr.process_group import kill_group, own_group
from cpr.uapi.process import end_with_parent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from subprocess import Popen

    from cpr.migration.cancellation import Cancellation
    from cpr.process_group import ReapLater


waited_for: set[int] = set()
"""The PIDs that somebody waits for; `starting` is held while one is not in there yet."""
starting = allocate_lock()


class Child:
    """A command in a process group of its own; `fd`, the pipe's end, is the caller's.

    Its stdin or stdout is the pipe, and the other of them /dev/null: a monitor may be on the
    VMM's own.  stderr is the VMM's.  One that writes ends with a VMM that is killed: it may be the
    new image of an update, past its deadline.
    """

    def __init__(self, args: list[str], writing: bool, reap_later: ReapLater) -> None:
        """Starts it; `writing` says that the caller writes.  Raises MigrationError.

        `reap_later(pid, reap)` has `reap()` called when the child has ended.
        """
        import subprocess

        self._reap_later = reap_later
        try:
            with starting:
                self._process: Popen = subprocess.Popen(
                    args,
                    stdin=subprocess.PIPE if writing else subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if writing else subprocess.PIPE,
                    process_group=own_group(),
                    preexec_fn=None if writing else partial(end_with_parent, signal.SIGKILL),
                )
                waited_for.add(self._process.pid)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise MigrationError(f"Could not run '{args[0]}': {reason}") from None
        stream = self._process.stdin if writing else self._process.stdout
        assert stream is not None
        try:
            self.fd = os.dup(stream.fileno())
        except OSError as error:
            self.kill()
            self.leave()
            raise MigrationError(f"Could not run '{args[0]}': {error.strerror}") from None
        finally:
            stream.close()

    def kill(self) -> None:
        """Ends it and what it has started; from any thread, and again."""
        process = self._process
        if process.returncode is None:
            kill_group(process)

    def wait(self, cancellation: Cancellation) -> int:
        """Its exit status, once it has ended.  Raises OSError ECANCELED where that comes first."""
        pidfd = os.pidfd_open(self._process.pid)
        try:
            cancellation.wait(pidfd, select.POLLIN)
        finally:
            os.close(pidfd)
        return self._process.wait()

    def leave(self) -> None:
        """Has it reaped once it ends, without waiting for that; from any thread."""
        if self._process.poll() is None:
            self._reap_later(self._process.pid, self._reap)
        else:
            self._reap()

    def _reap(self) -> None:
        self._process.wait()
        waited_for.discard(self._process.pid)
