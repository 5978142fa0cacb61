"""This process as an image among others: what it got from the one before, and what it will give.

There is one of these, `current()`.  After an exec it speaks to the previous program: the first use
asks for what that program has (`connect`), `take_over` asks it to stop and to hand over the state,
and `commit` ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from cpr.constants import STDERR
from cpr.live import forked, last_words, new_image, notify, payload, transaction
from cpr.live import token as tokens
from cpr.live.errors import UpdateError
from cpr.live.preserved import Registry
from cpr.live.transaction import EARLY, END, HAND_OVER, LATE, READY, REHEARSE, STATE

if TYPE_CHECKING:
    from cpr.live.messages import Message

NAME = "cpr.live"
REAP_MS = 50  # for so long a commit waits for the old program's end


class Previous(NamedTuple):
    """The program before this one: the PID it was updated under, its command, and its start.

    `started` is in seconds since the epoch.  `failure`: why its update to another program failed,
    after which this one, its own command, was executed to give the PID back; else empty.
    """

    pid: int
    argv: list[str]
    started: float
    failure: str = ""


class Image:
    """What this process has and got; `registry` are the names."""

    def __init__(self, folder: str) -> None:
        self.registry = Registry()
        self.pid = os.getpid()
        """Of the process that updates itself, and no child does: of the first use, or, for one that
        becomes a daemon in between, of the first `commit`; of the guard where an update fails."""
        self._committed = False
        self.folder = folder
        self.argv = [sys.executable or sys.orig_argv[0], *sys.orig_argv[1:]]
        self.started = time.time()
        self.generation = 0
        self.previous: Previous | None = None
        self.saver: Callable[[], Any] | None = None
        self.save_version = 1
        self.parts: dict[str, Callable[[payload.Writer], dict[str, Any]]] = {}
        self.obstacles: list[Callable[[], str | None]] = []
        self.pausing: list[Callable[[], Any]] = []
        self.resuming: list[Callable[[], Any]] = []
        self.committing: list[Callable[[], Any]] = []
        self.updating = False
        """An update or a rehearsal is under way: there is one at a time."""
        self._header: dict[str, Any] | None = None
        self._body: dict[str, Any] | None = None
        self._reader: payload.Reader | None = None
        self._asked = False
        self._stderr = -1
        self._failure: UpdateError | None = None
        self._link: Any = None  # a Predecessor
        try:
            if new_image.VARIABLE in os.environ:
                from cpr import live

                new_image.check_process(live._pid)
            self._link = new_image.find_predecessor(forked)
        except transaction.UpdateError as error:
            self._failure = UpdateError(str(error))

    @property
    def is_starting(self) -> bool:
        """There is a previous program, which still has the right to everything."""
        return self._link is not None

    def adopt(self, link: Any, body: dict[str, Any], fds: list[int]) -> None:
        """Everything at once, for `testing`: header and hand-over in one, and their descriptors."""
        self._link, self._header, self._body = link, body, body
        self._reader = payload.Reader(fds[0])
        self.registry.receive(body["names"], body["fresh"], fds[1:])
        self.registry.move(body["names"])
        self.generation = int(body["generation"]) + 1
        self.previous = Previous(int(body["pid"]), list(body["argv"]), body["started"])

    def connect(self) -> None:
        """Gets what the previous program has, while it goes on.  Raises UpdateError."""
        if self._failure is not None:
            raise self._failure
        if self._link is None or self._header is not None:
            return
        if self._link.mode in (EARLY, REHEARSE):
            self._call(self._link.hello, NAME)
        message = self._receive(STATE)
        header, fds = message.body, message.fds
        if header.get("stderr"):
            self._stderr = fds.pop(0)
        self.registry.private_memory = self._link.mode == REHEARSE
        self.registry.receive(header["names"], list(header["names"]), fds)
        self.generation = int(header["generation"]) + 1
        self.previous = Previous(
            int(header["pid"]), list(header["argv"]), header["started"], header.get("failure", "")
        )
        self._header = header

    def take_over(self) -> None:
        """Asks the previous program to stop, and gets the rest.  Raises UpdateError."""
        self.connect()
        if self._link is None or self._body is not None:
            return
        if self._link.mode == EARLY:
            self._call(self._link.send, READY)
        self._asked = True
        message = self._receive(HAND_OVER)
        body, fds = message.body, message.fds
        self._reader = payload.Reader(fds.pop(0))
        self.registry.receive(body["names"], body["fresh"], fds)
        self.registry.move(body["names"])
        self.registry.forget_unclaimed(set(body["names"]))
        notify.inherit(body.get("stored", ()))
        self._body = body

    def state(self, default: Any, version: int) -> Any:
        """What the previous program has saved; a later version than ours is refused before."""
        self.connect()
        if self._header is None:
            return default
        saved = int(self._header["version"])
        if saved > version:
            self.refuse(
                f"the state of '{self._header['saver']}' has version {saved}, and the new program "
                f"knows version {version}"
            )
        self.take_over()
        assert self._body is not None and self._reader is not None
        return self._reader.get_value(self._body["state"], default)

    def part(self, name: str) -> tuple[Any, payload.Reader] | None:
        """What the previous program's part of that name has saved, and the bytes it points to.

        Once: who asks has it from then on.
        """
        self.take_over()
        if self._body is None or self._reader is None or name not in self._body["parts"]:
            return None
        return self._body["parts"].pop(name), self._reader

    def commit(self) -> None:
        """Everything is this program's; the previous one ends.  Raises UpdateError: too late.

        The service's manager hears of it.  Signals come last: one may ask for the next update.
        """
        self.take_over()
        link, blocked = self._link, []
        if link is not None:
            if link.mode == REHEARSE:
                self._end_rehearsal(link)
            self._call(link.commit)
            assert self._header is not None
            blocked = self._header["blocked"]
        try:
            self._own(link)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def _own(self, link: Any) -> None:
        """What a commit has to do when everything is this program's."""
        if link is not None:
            self._link = None
            self._forget_unclaimed()
            self._get_stderr_back()
            if isinstance(link, new_image.Predecessor):
                guard_pid = link.page.struct.guard_pid
                link.close()
                _reap(guard_pid)
        if not self._committed:
            self._committed, self.pid = True, os.getpid()
        hooks, self.committing = self.committing, []
        for hook in hooks:
            hook()
        notify.started(link is not None)

    def refuse(self, reason: str) -> None:
        """Says why this program cannot take over, and ends it: nothing was handed over.

        Raises UpdateError where the previous program is not there any more.
        """
        assert self._link is not None
        if self._link.mode == LATE and not self._asked:  # it has been sent, and comes first
            self._asked = True
            try:
                self._link.receive(HAND_OVER).close()
            except transaction.UpdateError:
                pass
        try:
            self._link.refuse(reason)
        except SystemExit:
            os._exit(1)  # no exit handler of a program that has taken nothing over
        raise UpdateError(reason)

    def _receive(self, kind: str) -> Message:
        """One that cannot be received, for want of descriptors, is said to the previous program."""
        assert self._link is not None
        try:
            return self._link.receive(kind)
        except transaction.UpdateError as error:
            reason = str(error)
        self.refuse(reason)
        raise UpdateError(reason)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except transaction.UpdateError as error:
            raise UpdateError(str(error)) from None

    def _end_rehearsal(self, link: Any) -> None:
        try:
            link.send(READY)
            link.receive(END)
        except (SystemExit, transaction.UpdateError):
            pass
        os._exit(0)

    def _forget_unclaimed(self) -> None:
        """Parts that here are nobody's, and their names: who is at the other end need not wait.

        The names of a part are the keys of what it has saved.
        """
        parts = self._body["parts"] if self._body is not None else {}
        for part in parts.keys() - self.parts.keys():
            for name in parts.pop(part):
                if self.registry.find(name) is not None and name not in self.registry.claimed:
                    self.registry.drop(name)

    def _get_stderr_back(self) -> None:
        """Until the commit stderr is a memfd that the previous program could read."""
        if self._stderr < 0:
            return
        try:
            if os.readlink(f"/proc/self/fd/{STDERR}").startswith(last_words.LINK):
                last_words.forward(STDERR, self._stderr)
                os.dup2(self._stderr, STDERR)
        except OSError:  # closed by the program
            pass
        os.close(self._stderr)
        self._stderr = -1


def _reap(pid: int) -> None:
    """Waits for the guard: a moment here, longer in a thread."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    ready = tokens.is_readable(pidfd, REAP_MS)
    os.close(pidfd)
    if ready:
        forked.reap(pid)
    else:
        name = f"cpr-live-reap-{pid}"
        with contextlib.suppress(RuntimeError):  # no thread for it: it stays a zombie
            threading.Thread(target=forked.reap, args=[pid], name=name, daemon=True).start()


_unreaped: dict[int, Callable[[], None]] = {}


def reap_later(pid: int, reap: Callable[[], None]) -> None:
    """Has `reap()` called by `reap_ended`: a thread that waits would be in the way of an update."""
    _unreaped[pid] = reap


def reap_ended() -> None:
    """Those of `reap_later` that have ended are no zombies any more."""
    for pid in list(_unreaped):
        try:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # of the process that this one is the guard of
            ended = True
        if ended:
            _unreaped.pop(pid)()


_current: Image | None = None


def current() -> Image:
    """The one image of this process."""
    global _current
    if _current is None:
        from cpr import live

        _current = Image(live._folder)
    return _current


def replace(image: Image | None) -> Image | None:
    """Puts another one in its place, for unit tests; the one that was there."""
    global _current
    before, _current = _current, image
    return before
