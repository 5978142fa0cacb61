"""One update or rehearsal from the old program's side, step by step.

`start` executes; `wait` is repeated until the new program is ready, by whoever waits for it; then
`hand_over` never returns on success.  `fail` undoes everything and gives the error to raise.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from cpr.constants import NS_PER_S
from cpr.live import (
    arguments,
    auditing,
    forked,
    hooks,
    image,
    notify,
    old_image,
    program,
    transaction,
)
from cpr.live.arguments import EARLY, FORK
from cpr.live.errors import UpdateError, reason_of
from cpr.live.kept import for_the_exec
from cpr.live.last_words import BOUND_MS, LAST_LINES, LastWords, bound
from cpr.live.said import Said, Send
from cpr.live.token import describe_status, is_readable
from cpr.live.transaction import BACK, HELLO, READY, REFUSE

fake: Callable[[Session], None] | None = None
"""What stands for the exec, and for a rehearsal's child, in a unit test (see `testing`)."""

update_signals: set[int] = set()
"""Signals that ask for an update; they stay blocked until the new program is ready for them."""


class Session:
    """One update.  Holds nothing open after `fail`."""

    def __init__(
        self,
        argv: Sequence[str] | None,
        env: Mapping[str, str] | None,
        timeout: float,
        mode: str = EARLY,
        guard: str = FORK,
        allow: Iterable[str] = (),
        back: bool = False,
    ) -> None:
        """Raises UpdateError for what can be seen to be wrong."""
        options = arguments.check(argv, env, timeout, mode, guard, allow, back)
        self._image = image.current()
        if os.getpid() != self._image.pid:
            raise UpdateError(
                f"only the program's own process, PID {self._image.pid}, updates itself; this one, "
                f"PID {os.getpid()}, was forked from it"
            )
        self._folder = self._image.folder if argv is None else None
        self.argv = self._image.argv if options.argv is None else options.argv
        self.env = dict(os.environ) if options.env is None else options.env
        self._allow = options.allow
        self.mode = mode
        self.timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._backend = forked if guard == FORK else _vm_backend()
        self._old_pid = os.getpid()
        self._update: old_image.Update | None = None
        self._said = Said(self._image, self._old_pid)
        self._last_words: LastWords | None = None
        self._paused = False
        self._blocked = sorted(update_signals - signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        self.rehearsing = False
        self._back = back
        self._refusal = ""
        if self._image.updating:
            raise UpdateError("an update is under way already")
        self._image.updating = True
        image.reap_ended()

    # The steps.

    def check(self) -> None:
        """Raises UpdateError for what would not survive."""
        if threading.current_thread() is not threading.main_thread():
            raise UpdateError(
                "an update is made by the main thread, which goes on if it fails, and not by "
                f"'{threading.current_thread().name}'; live.update_on takes a signal from anywhere"
            )
        if self._image.is_starting:
            raise UpdateError("this program has not called live.ready(): it cannot be updated yet")
        self._image.registry.describe()
        if found := auditing.blocking(self._image, self._allow):
            raise UpdateError(
                "; ".join(f"{each}; allow='{each.kind}' accepts that" for each in found)
            )

    def pause(self) -> None:
        """What has said so by live.on_pause ends its threads."""
        self._paused = True
        for hook in self._image.pausing:
            hooks.call("on_pause", hook)

    def resume(self) -> None:
        """Calls all functions of live.on_resume, and then raises the first error of theirs."""
        resuming = self._image.resuming if self._paused else []
        self._paused = False
        hooks.call_all("on_resume", resuming)

    def start(self) -> None:
        """Executes.  Early: returns in the guard.  Late: raises UpdateError; see `fail`.

        A late one returns where the old command is executed to give the PID back, too: then it goes
        on as an early one.
        """
        if fake is not None:
            fake(self)
        self._update = old_image.Update(backend=self._backend)
        early = self.mode == EARLY
        try:
            self._last_words = words = LastWords()
        except OSError as error:
            raise UpdateError(f"descriptors of the update: {error.strerror}") from None
        if not early:
            self._send_header(self._update.leave_open)
            self._send_rest(self._update.queue)
        try:
            with for_the_exec(words, self._blocked, self._folder):
                self._update.execute(
                    self.argv, self.env, early=early, timeout_ns=int(self.timeout * NS_PER_S)
                )
        except OSError as error:
            place = error.filename
            if not place or error.errno in old_image.NO_DESCRIPTORS:
                place = "descriptors of the update"
            raise UpdateError(f"{place}: {error.strerror}") from None
        finally:
            self._image.pid = os.getpid()  # the guard's, in the guard
        if not early:
            self._receive()
            if not self._refusal:
                raise UpdateError("the new program spoke out of turn")

    def spawn(self) -> None:
        """Starts the program as a child, for a rehearsal; `end_rehearsal` has to follow."""
        self.rehearsing = True
        if fake is not None:
            fake(self)
            return
        self._update = old_image.Update(backend=self._backend)
        env = {name: value for name, value in self.env.items() if name != notify.SOCKET}
        self._update.spawn(self.argv, env, image.reap_later, self._folder)

    def end_rehearsal(self) -> list[str]:
        """Ends the child, if there is one; its last lines of stderr."""
        self._image.updating = False
        if self._update is None:
            return []
        text = self._update.end_child()[1] if self._update.pid else ""
        self._update.close()
        self._image.registry.restore()
        return text.splitlines()[-LAST_LINES:]

    def fds(self) -> tuple[int, int]:
        """Early: the socket, and the pidfd of the new program; `wait` when one is readable."""
        assert self._update is not None
        return self._update.fileno(), self._update.pidfd

    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self._deadline - time.monotonic(), 0.0)

    def wait(self, block: bool = True) -> bool:
        """Early: true when the new program is ready.  Raises UpdateError."""
        if self._update is None:
            return True  # a rehearsal in a unit test
        sock, pidfd = self.fds()
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(min(self.remaining() * 1000, BOUND_MS) if block else 0)}
        bound()
        if sock in ready and self.has_message():
            return self._receive()
        hung_up = sock in ready and pidfd not in ready and block
        if hung_up and is_readable(pidfd, int(self.remaining() * 1000)):
            ready.add(pidfd)
        if pidfd in ready:
            self._raise_death()
        if self.remaining() == 0:
            self.raise_late()
        return False

    def check_new(self) -> None:
        """Raises UpdateError where there is a new program, and it has ended."""
        pidfd = self._update.pidfd if self._update is not None else -1
        if pidfd >= 0 and is_readable(pidfd):
            self._raise_death()

    def raise_late(self) -> NoReturn:
        raise UpdateError(
            f"the new program did not take over within {self.timeout:g} s, and was killed"
        )

    def hand_over(self) -> None:
        """Early: gives everything away, and ends.

        Returns where the new program refuses now, and the old command is executed to give the PID
        back: that is waited for again.  Raises UpdateError.
        """
        assert self._update is not None
        self._send_rest(self._send)
        poll = select.poll()
        poll.register(self._update.pidfd, select.POLLIN)
        poll.register(self._update.token, select.POLLOUT)
        poll.register(self._update.fileno(), select.POLLIN)
        while ready := {fd for fd, _ in poll.poll(self.remaining() * 1000)}:
            if self._update.token in ready:
                self._update.leave()
            if self._update.pidfd in ready:
                self._raise_death()
            if self.has_message():
                self._receive()  # it has no more to say than that it refuses
                return
            poll.unregister(self._update.fileno())  # it has hung up
        self.raise_late()

    def fail(self, error: BaseException) -> UpdateError:
        """Everything is this program's again; what is to be raised for `error`."""
        self._image.updating = False
        update, lines = self._update, []
        changed: list[str] = []
        ended_by = getattr(error, "ended_by", 0)
        if update is not None:
            if not update.take_back():
                update.leave()  # the new program has committed after all
            ended_by = ended_by or update.pending_signal()
            update.close()
            changed = self._image.registry.restore()
        if self._last_words is not None:
            lines = self._last_words.take()
        reason = "; ".join([reason_of(error), *changed])
        try:
            self.resume()
        except UpdateError as failed:
            reason += f"; {failed.reason}"
        if self._refusal:
            reason = f"{self._refusal}; the PID is not given back: {reason}"
        notify.failed()
        return UpdateError(
            reason,
            getattr(error, "wait_status", getattr(error, "status", None)),
            os.getpid() != self._old_pid,
            lines,
            ended_by,
        )

    # What is said.

    def has_message(self) -> bool:
        """Early: whether the new program has said something that `wait` has not seen yet."""
        assert self._update is not None
        return self._update.has_message()

    def _receive(self) -> bool:
        assert self._update is not None
        message = self._update.receive()
        message.close()
        if message.kind == HELLO:
            self._send_header(self._send)
            if self.rehearsing:
                self._send_rest(self._update.queue)
        elif message.kind == REFUSE:
            self._take_refusal(message.reason)
        return message.kind == READY

    def _take_refusal(self, reason: str) -> None:
        """Has the old command executed in the PID, if it may; else raises UpdateError."""
        assert self._update is not None
        changed = program.changed_files(self._image.started) if self._back else []
        if not self._back or self.rehearsing or self._refusal or changed:
            self._update.end(1)
            if changed:
                reason += f"; the PID is not given back: {changed[0]} has changed"
            raise UpdateError(reason)
        self._refusal = reason
        this = self._image
        this.registry.restore()
        variables = dict(os.environ)
        body = {"argv": this.argv, "cwd": this.folder, "environment": variables}
        blocked = {*signal.pthread_sigmask(signal.SIG_BLOCK, ()), *self._blocked}
        self._send(BACK, {**body, "blocked": sorted(blocked)}, [])

    def _raise_death(self) -> NoReturn:
        assert self._update is not None
        status = self._update.exit_status()
        reason = f"the new program {describe_status(status)} before it took over"
        raise UpdateError(reason, status)

    def _send(self, kind: str, body: dict[str, Any], fds: Sequence[int]) -> None:
        """To a new program that runs.  Raises UpdateError: of its end, where it takes nothing."""
        assert self._update is not None
        try:
            self._update.send(kind, body, fds)
        except transaction.UpdateError:
            if is_readable(self._update.pidfd, BOUND_MS):  # it hangs up a moment before its end
                self._raise_death()
            raise

    def _send_header(self, send: Send) -> None:
        stderr = self._last_words.real if self._last_words is not None else -1
        self._said.header(send, self._blocked, self._refusal, stderr)

    def _send_rest(self, send: Send) -> None:
        self._said.rest(send, self.rehearsing)


def _vm_backend() -> ModuleType:
    try:
        from cpr.live import guard
    except ImportError as error:
        raise UpdateError(f"guard='vm' needs the C part of cpr: {error}") from None
    return guard
