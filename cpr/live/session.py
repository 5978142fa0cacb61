"""One update or rehearsal from the old program's side, step by step.

`start` executes; `wait` is repeated until the new program is ready, by whoever waits for it; then
`hand_over` never returns on success.  `fail` undoes everything and gives the error to raise.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from cpr.constants import NS_PER_S, STDERR
from cpr.errors import CprError
from cpr.live import auditing, forked, image, old_image, payload, transaction
from cpr.live.errors import UpdateError
from cpr.live.preserved import Entry
from cpr.live.token import describe_status
from cpr.live.transaction import HAND_OVER, HELLO, READY, REFUSE, STATE

EARLY, LATE = "early", "late"
FORK, VM = "fork", "vm"
LAST_LINES = 20

fake: Callable[[Session], NoReturn] | None = None
"""What stands for the exec in a unit test (see `testing`)."""

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
    ) -> None:
        """Raises UpdateError for what can be seen to be wrong."""
        self._image = image.current()
        self._folder = self._image.folder if argv is None else None
        self.argv = [os.fspath(word) for word in (self._image.argv if argv is None else argv)]
        self.env = dict(os.environ if env is None else env)
        self._allow = allow
        if mode not in (EARLY, LATE):
            raise UpdateError(f"mode '{mode}' is neither early nor late")
        if guard not in (FORK, VM):
            raise UpdateError(f"guard '{guard}' is neither fork nor vm")
        if not timeout > 0:
            raise UpdateError(f"a timeout of {timeout} s is none")
        if not self.argv:
            raise UpdateError("an empty command cannot be executed")
        self.mode = mode
        self.timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._backend = forked if guard == FORK else _vm_backend()
        self._old_pid = os.getpid()
        self._update: old_image.Update | None = None
        self._sent: dict[str, Entry] = {}
        self._stderr, self._real_stderr = -1, -1
        self._paused = False
        self._blocked = sorted(update_signals - signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        self._rehearsing = False

    # The steps.

    def check(self) -> None:
        """Raises UpdateError for what would not survive."""
        if self._image.is_starting:
            raise UpdateError("this program has not called live.ready(): it cannot be updated yet")
        found = self._image.registry.check()
        blockers = auditing.blocking(self._image, self._allow)
        found += [f"{each}; allow='{each.kind}' accepts that" for each in blockers]
        if found:
            raise UpdateError("; ".join(found))

    def pause(self) -> None:
        """What has said so by live.on_pause ends its threads."""
        self._paused = True
        for hook in self._image.pausing:
            hook()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            for hook in self._image.resuming:
                hook()

    def start(self) -> None:
        """Executes.  Early: returns in the guard.  Late: raises UpdateError; see `fail`."""
        if fake is not None:
            fake(self)
        self._update = old_image.Update(backend=self._backend)
        early = self.mode == EARLY
        self._real_stderr = _duplicate(STDERR)
        if not early:
            self._send_header(self._update.queue)
            self._send_rest(self._update.queue)
        self._divert_stderr()
        folder = os.getcwd() if self._folder else None
        loop = _Loop()
        try:
            if self._folder:
                os.chdir(self._folder)
            self._update.execute(
                self.argv, self.env, early=early, timeout_ns=int(self.timeout * NS_PER_S)
            )
        except OSError as error:
            raise UpdateError(f"the folder {self._folder}: {error.strerror}") from None
        finally:
            loop.restore()
            self._restore_stderr()
            if folder:
                os.chdir(folder)
        if not early:
            self._receive()
            raise UpdateError("the new program spoke out of turn")

    def spawn(self) -> None:
        """Starts the program as a child, for a rehearsal; `end_rehearsal` has to follow."""
        self._rehearsing = True
        self._update = old_image.Update(backend=self._backend)
        self._update.spawn(self.argv, self.env, self._folder)

    def end_rehearsal(self) -> tuple[int | None, list[str]]:
        """Ends the child: its return code as subprocess has it, and its last lines of stderr."""
        assert self._update is not None
        if self._update.pid == 0:
            self._update.close()
            return None, []
        code, text = self._update.end_child()
        self._update.close()
        return code, text.splitlines()[-LAST_LINES:]

    def fds(self) -> tuple[int, int]:
        """Early: the socket, and the pidfd of the new program; `wait` when one is readable."""
        assert self._update is not None
        return self._update.fileno(), self._update.pidfd

    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self._deadline - time.monotonic(), 0.0)

    def wait(self, block: bool = True) -> bool:
        """Early: true when the new program is ready.  Raises UpdateError."""
        sock, pidfd = self.fds()
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self.remaining() * 1000 if block else 0)}
        if sock in ready and self.has_message():
            return self._receive()
        if sock in ready and pidfd not in ready and block:  # it has hung up, and may end now
            ready |= set(select.select([pidfd], [], [], self.remaining())[0])
        if pidfd in ready:
            self._raise_death()
        if self.remaining() == 0:
            self.raise_late()
        return False

    def raise_late(self) -> NoReturn:
        raise UpdateError(
            f"the new program did not take over within {self.timeout:g} s, and was killed"
        )

    def hand_over(self) -> NoReturn:
        """Early: gives everything away; comes back only by UpdateError."""
        assert self._update is not None
        self._send_rest(self._update.send)
        poll = select.poll()
        poll.register(self._update.pidfd, select.POLLIN)
        poll.register(self._update.token, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(self.remaining() * 1000)}
        if self._update.token in ready:
            self._update.leave()
        if self._update.pidfd in ready:
            self._raise_death()
        self.raise_late()

    def fail(self, error: BaseException) -> UpdateError:
        """Everything is this program's again; what is to be raised for `error`."""
        update, lines = self._update, []
        if update is not None:
            started = update.pid != 0 and update.state != transaction.CLOSED
            if started and not update.take_back():
                update.leave()  # the new program has committed after all
            update.close()
        if self._real_stderr >= 0:
            os.close(self._real_stderr)
            self._real_stderr = -1
        if self._stderr >= 0:
            text = image.forward_stderr(self._stderr, STDERR)
            lines = text.decode(errors="replace").splitlines()[-LAST_LINES:]
            os.close(self._stderr)
            self._stderr = -1
        self.resume()
        reason = str(error) if isinstance(error, CprError) else repr(error)
        return UpdateError(
            getattr(error, "reason", reason),
            getattr(error, "wait_status", getattr(error, "status", None)),
            os.getpid() != self._old_pid,
            lines,
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
            self._send_header(self._update.send)
            if self._rehearsing:
                self._send_rest(self._update.queue)
        elif message.kind == REFUSE:
            self._update.end(1)
            raise UpdateError(str(message.body.get("reason")))
        return message.kind == READY

    def _raise_death(self) -> NoReturn:
        assert self._update is not None
        status = self._update.exit_status()
        reason = f"the new program {describe_status(status)} before it took over"
        raise UpdateError(reason, status)

    def _send_header(self, send: Any) -> None:
        this, entries = self._image, self._image.registry.entries
        names = {name: entry.describe() for name, entry in entries.items()}
        fds = [entry.fd for entry in entries.values()]
        self._sent = dict(entries)
        body = {
            "pid": self._old_pid,
            "argv": this.argv,
            "started": this.started,
            "generation": this.generation,
            "version": this.save_version if this.saver is not None else 0,
            "saver": getattr(this.saver, "__qualname__", str(this.saver)),
            "names": names,
            "blocked": self._blocked,
        }
        if self._real_stderr >= 0:
            body["stderr"], fds = True, [self._real_stderr, *fds]
        send(STATE, body, fds)

    def _send_rest(self, send: Any) -> None:
        this, entries = self._image, self._image.registry.entries
        writer = payload.Writer()
        try:
            value = this.saver() if this.saver is not None else None
            what = f"what {getattr(this.saver, '__qualname__', 'on_save')} returned"
            state = writer.add_value(value, what)
            parts = {name: part(writer) for name, part in this.parts.items()}
            found = this.registry.check()
            if not self._rehearsing:
                found += [why for obstacle in this.obstacles if (why := obstacle())]
            if found:
                raise UpdateError("; ".join(found))
            fresh = [name for name, entry in entries.items() if self._sent.get(name) is not entry]
            body = {
                "names": {name: entry.describe() for name, entry in entries.items()},
                "fresh": fresh,
                "state": state,
                "parts": parts,
            }
            send(HAND_OVER, body, [writer.fd, *(entries[name].fd for name in fresh)])
        finally:
            writer.close()

    # What the exec changes in this process, and what is put back.

    def _divert_stderr(self) -> None:
        """The new program's stderr is a memfd until it commits: its last words are known."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None:
                stream.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        if self._real_stderr >= 0:
            self._stderr = os.memfd_create("cpr-live-stderr")
            os.dup2(self._stderr, STDERR)

    def _restore_stderr(self) -> None:
        if self._real_stderr >= 0 and self._stderr >= 0:
            os.dup2(self._real_stderr, STDERR)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._blocked)


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError:  # there is no stderr
        return -1


def _vm_backend() -> ModuleType:
    try:
        from cpr.live import guard
    except ImportError as error:
        raise UpdateError(f"guard='vm' needs the C part of cpr: {error}") from None
    return guard


class _Loop:
    """asyncio forgets its running loop in a child, which the guard is."""

    def __init__(self) -> None:
        self._events = sys.modules.get("asyncio.events")
        self._loop = self._events._get_running_loop() if self._events else None
        policy = getattr(self._events, "_event_loop_policy", None)
        self._policy, self._local = policy, getattr(policy, "_local", None)
        try:
            self._wakeup = signal.set_wakeup_fd(-1)
        except ValueError:  # not the main thread
            self._wakeup = -1
        self._set_wakeup()

    def restore(self) -> None:
        if self._events is not None and self._loop is not None:
            self._events._set_running_loop(self._loop)
        if self._policy is not None and self._local is not None:
            self._policy._local = self._local
        self._set_wakeup()

    def _set_wakeup(self) -> None:
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
