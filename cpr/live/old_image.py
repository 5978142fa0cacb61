"""The old image's side of an update: what it holds, says and waits for; see `transaction`."""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import errno
import os
import time
from _thread import allocate_lock, start_new_thread

from cpr.constants import NS_PER_MS
from cpr.live import oom
from cpr.live import token as tokens
from cpr.live.old_channel import Channel
from cpr.live.transaction import (
    CLOSED,
    EARLY,
    END,
    ENDING,
    EXEC_PID,
    LATE,
    REHEARSE,
    VARIABLE,
    UpdateError,
)
from cpr.phases import mark

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from types import ModuleType
    from typing import Any

    from cpr.process_group import ReapLater

NO_TASK = "there is no process for the guard: raise RLIMIT_NPROC, pids.max or RLIMIT_AS"
FAILURE = 1  # the exit status of a program that cannot load its state, also of QEMU
LAST_BYTES = 2000  # of what a rehearsed program has said
END_TIMEOUT_MS = 5000  # for a new image that was told to end, and starts
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)

_undying: tuple[int, Any] | None = None
"""The pidfd of a new image that leads this session and has not ended when it was killed, and what
SIGHUP did before: its end will hang up the terminal."""


class Update(Channel):
    """The old image's side of one update.  Owns the token, the page and the socket until `close`.

    After an early `execute`, or a late one that was refused, `pid` and `pidfd` are the new image's,
    and `receive` waits for what it says.
    """

    def __init__(
        self, mappings: Sequence[tuple[int, int]] = (), backend: ModuleType | None = None
    ) -> None:
        """`mappings` as for guard.execute; `backend` is what makes the guard: guard or forked.

        Raises UpdateError; then nothing stays open.
        """
        super().__init__()
        _hear_hangups_again()
        self._guard = guard = backend or _default_backend()
        self.pid = 0
        self.pidfd = -1
        self.dropped = False
        self._has_token = self._killed = False
        self._words = -1
        self._blocked = self._pending = frozenset[int]()
        self._on_hangup: Any = None
        self._mappings = list(mappings)
        self.token = -1
        try:
            self.page = guard.Page()
        except OSError as error:
            raise UpdateError(f"memfd of the update: {error.strerror}") from None
        self.page.struct.began_ns = time.monotonic_ns()
        try:
            self.token = tokens.create_token()
            self.open_channel()
        except OSError as error:
            self.close()
            raise UpdateError(f"descriptors of the update: {error.strerror}") from None

    def environment(self, mode: str, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with what tells a program of this update."""
        assert self._theirs is not None
        fds = f"{self.token},{self.page.fd},{self._theirs.fileno()}"
        return {**base, VARIABLE: f"{fds},{mode}"}

    @property
    def handed_fds(self) -> list[int]:
        """The descriptors that `environment` names."""
        assert self._theirs is not None
        return [self.token, self.page.fd, self._theirs.fileno()]

    def execute(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        early: bool,
        timeout_ns: int,
        keep: Sequence[int] = (),
        state_fd: int = -1,
        kept_fd: int = -1,
        drop: Sequence[int] = (),
        interrupted: Callable[[], bool] = lambda: False,
        holds_signals: bool = False,
        cpus: Collection[int] = (),
        park: Callable[[], None] = lambda: None,
        unpark: Callable[[], None] = lambda: None,
    ) -> None:
        """Becomes `argv` under this PID; `keep` are descriptors that go over besides.

        An early one returns in the guard when that has happened, a late one when the new image has
        refused: it then waits to be told what to do.  Raises UpdateError: nothing has happened, or
        the old image goes on in another process, and there is no new one any more.

        With `holds_signals` the new image has the signals ENDING blocked, for as long as it has no
        handler for them; it is one that unblocks them then.  Otherwise it has those blocked that
        the caller has.
        `cpus` are those that the old image goes on on, if they are not the caller's.
        `park()` ends the other threads; it is called last thing, and may raise.  `unpark()` is its
        inverse, called wherever the old image goes on after that.
        `interrupted()` tells of one that the old image has taken, and would not come to.

        With `state_fd` the program is one that knows nothing of this, and gets only `keep`;
        `kept_fd` is one of those that it does not close, or -1.  `drop`
        are descriptors that a late exec closes here too; `dropped` says that it has.
        """
        parked = False

        def ready() -> None:
            nonlocal parked
            if holds_signals:
                _check_task()
            workers = tokens.workers()
            parked = True
            park()
            self._guard.wait_alone(workers)
            if interrupted():
                raise UpdateError("a signal that ends what is updated has come before the exec")
            mark("exec")

        from cpr.live import notify

        held = holds_signals and state_fd < 0
        manager = notify.connect()
        sibling = manager is not None and notify.is_child()
        leads = tokens.leads_terminal()
        if sibling:
            environment = {**environment, EXEC_PID: str(os.getpid())}
        # All, until it is known who has the token: a handler may raise.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._blocked = frozenset(blocked)
        try:
            returned = self._guard.execute(
                argv,
                environment
                if state_fd >= 0
                else self.environment(EARLY if early else LATE, environment),
                [*keep, *self._left_open, *([] if state_fd >= 0 else self.handed_fds)],
                self.token,
                self.page,
                early=early,
                socket=-1 if early else self.fileno(),
                timeout_ns=timeout_ns,
                mappings=self._mappings,
                state_fd=state_fd,
                kept_fd=kept_fd,
                drop=drop,
                mask=blocked | set(ENDING) if held else blocked,
                unblock=() if held else set(ENDING) - blocked,
                ending=ENDING if held else (),
                notify_fd=manager.fileno() if manager is not None else -1,
                sibling=sibling,
                cpus=cpus,
                ready=ready,
            )
            if leads:
                self._ignore_hangup()
            # Before a signal can be taken whose handler raises: it would be forgotten who has it.
            self.pid, self.pidfd = returned.pid, returned.pidfd
            self.dropped, self._pending = returned.dropped, returned.signalled
            self._killed = returned.outcome == self._guard.KILLED
            self._has_token = self._killed or returned.outcome == self._guard.DIED
        except (OSError, ValueError) as error:
            raise _not_executed(argv, error) from None
        finally:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            finally:
                if manager is not None:
                    manager.close()
                if parked:
                    unpark()
        if sibling and self._guard.SIBLINGS:
            notify.became_child()
        self.give_theirs()
        if returned.outcome in (self._guard.EARLY, self._guard.MESSAGE):
            return
        self._set(CLOSED)
        if returned.outcome == self._guard.KILLED:
            raise UpdateError(
                f"the new program did not take over within {timeout_ns // NS_PER_MS} ms, and was "
                "killed",
                True,
                self.pending_signal(),
            )
        status = self._guard.exit_status(self.pid, self.pidfd)
        ended_itself = self.page.struct.ended and (status is None or os.WIFEXITED(status))
        if ended_itself or (returned.consumed and _is_guests_end(status)):
            self._guard.end(self._mappings)
        ended_by = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else 0
        raise UpdateError(
            f"the new program {tokens.describe_status(status)} before it took over",
            True,
            ended_by if ended_by in ENDING else self.pending_signal(),
            status,
        )

    def _ignore_hangup(self) -> None:
        """The end of a process that leads a session hangs up its terminal, and the guard is in that
        session; until `close`, when the new image has ended."""
        try:
            self._on_hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        except ValueError:  # not the main thread
            pass

    def spawn(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        reap_later: ReapLater,
        folder: str | None = None,
    ) -> None:
        """Starts `argv` as a child, for a rehearsal; `reap_later` as for process_group.end_group.

        Raises UpdateError; then there is none.
        """
        import subprocess

        from cpr.live import last_words
        from cpr.process_group import own_group

        assert self._theirs is not None
        self._reap_later = reap_later
        try:
            # No pipe, which others may hold.
            self._words = last_words.create("cpr-rehearsal-stderr")
            self._child = subprocess.Popen(
                list(argv),
                env=self.environment(REHEARSE, environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                pass_fds=self.handed_fds,
                cwd=folder,
                process_group=own_group(),
            )
        except (OSError, ValueError) as error:
            raise _not_executed(argv, error) from None
        self.pid = self._child.pid
        oom.offer(self.pid)
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            self.end_child()
            raise UpdateError(f"descriptors of the rehearsal: {error.strerror}") from None
        self.give_theirs()

    def end_child(self) -> tuple[int | None, str]:
        """Ends the child of `spawn`: its exit status, None where it does not end, as another user's
        may not, and the end of its stderr."""
        from cpr.live import last_words
        from cpr.process_group import end_group

        status = end_group(self._child, self._reap_later)
        return status, last_words.end_of(self._words, LAST_BYTES)

    def take(self) -> bool:
        """Takes the token; true also where this image has it; false: the new one has committed."""
        self._has_token = self._has_token or tokens.take_token(self.token)
        return self._has_token

    def take_back(self) -> bool:
        """As `take`, and kills the new image if there is one."""
        if self.take():
            self.kill()
        return self._has_token

    @property
    def has_token(self) -> bool:
        return self._has_token

    def kill(self) -> None:
        """Ends the new image, once, and waits for that, but not for ever; see token.kill."""
        if self.pidfd >= 0 and not self._killed:
            self._killed = True
            self.pending_signal()  # while it is there
            if tokens.kill(self.pidfd):
                self._guard.adopted()

    def end(self, status: int) -> None:
        """The VM ends: the new image does so too, with `status`; it is killed where it does not."""
        try:
            self.send(END, {"status": status})
        except UpdateError:
            pass
        if self.pidfd >= 0 and not self.is_dead(END_TIMEOUT_MS):
            self.kill()

    def is_dead(self, timeout_ms: int) -> bool:
        """Whether the new image has ended, or does so within the time."""
        return tokens.is_readable(self.pidfd, timeout_ms)

    def pending_signal(self) -> int:
        """The one of ENDING that waits for the new image, or 0: it is for what is updated.

        Where that has ended it is the one that was seen last.  One that the program has blocked
        waits for nobody.
        """
        self._pending = tokens.pending_signals(self.pid, self._pending)
        waiting = self._pending - self._blocked
        return next((number for number in ENDING if number in waiting), 0)

    def exit_status(self) -> int | None:
        """The wait status of the new image, which has ended, if it can be known."""
        return self._guard.exit_status(self.pid, self.pidfd)

    def leave(self) -> None:
        """The new image has committed: this process ends here."""
        from cpr.live import notify

        notify.handed_over(self.pid)
        self._guard.end(self._mappings)

    def close(self) -> None:
        """Frees everything; may be called twice."""
        self.close_channel()
        if self._on_hangup is not None:
            global _undying
            _undying, self.pidfd = (self.pidfd, self._on_hangup), -1
            self._on_hangup = None
            _hear_hangups_again()
        for fd in (self.token, self.pidfd):
            if fd >= 0:
                os.close(fd)
        if self._words >= 0:
            from cpr.live import last_words

            last_words.close(self._words)
        self.token = self.pidfd = self._words = -1
        if self.page is not None and self.page.struct is not None:
            self.page.close()


def _hear_hangups_again() -> None:
    """SIGHUP does what it did, where no new image is left whose end would hang up the terminal."""
    global _undying
    if _undying is not None and tokens.is_readable(_undying[0]):
        pidfd, handler = _undying
        try:
            signal.signal(signal.SIGHUP, handler)
        except ValueError:  # not the main thread
            return
        _undying = None
        os.close(pidfd)


def _is_guests_end(status: int | None) -> bool:
    """Whether a program that knows nothing of this, and has read its state, has ended by what was
    in that: with another exit status than that of what cannot load it, as isa-debug-exit has it."""
    return status is not None and os.WIFEXITED(status) and os.WEXITSTATUS(status) != FAILURE


def _check_task() -> None:
    """The guard is one task more than the threads that are ended for it.  Raises UpdateError."""
    ended = allocate_lock()
    ended.acquire()
    try:
        start_new_thread(ended.release, ())
    except RuntimeError:
        raise UpdateError(NO_TASK) from None
    ended.acquire()


def _not_executed(argv: Sequence[str], error: OSError | ValueError) -> UpdateError:
    text = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and error.errno in NO_DESCRIPTORS:  # of the guard, before
        return UpdateError(f"descriptors of the update: {text}")
    return UpdateError(f"execvp {argv[0] if argv else ''} failed: {text}")


def _default_backend() -> ModuleType:
    from cpr.live import guard

    return guard
