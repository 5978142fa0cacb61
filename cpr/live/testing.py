"""A fake of the exec, for the unit tests of programs that update themselves.

    from cpr.live import testing

    def test_the_counter_goes_over():
        with testing.fake() as process:
            serve_three_requests()
            process.run(live.update)           # checks, saves, and ends this program
            assert process.argv[-1] == "server.py"
            process.restart()                  # from here on this is the new program
            assert live.state() == {"requests": 3}
            live.ready()

    def test_it_goes_on_if_the_update_fails():
        with testing.fake() as process:
            process.fail("the new program has ended with exit status 1", status=1)
            with pytest.raises(live.UpdateError):
                live.update()

Nothing is executed and no process is made, by `live.rehearse` neither.  What is real: names,
memory, the state's JSON and version, the audit, the order of the calls.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from cpr.live import arguments, image, session
from cpr.live.errors import UpdateError

WAIT_STATUS_SHIFT = 8  # of an exit status in a wait status


class Executed(BaseException):
    """What ends the old program where the exec would; `Process.run` catches it."""


class Process:
    """The process of a test: `argv` and `env` are those of the last update, `mode` its mode."""

    def __init__(self) -> None:
        self.argv: list[str] = []
        self.env: dict[str, str] = {}
        self.mode = ""
        self.updates = 0
        self.committed = False
        self._failure: UpdateError | None = None
        self._old: image.Image | None = None
        self._body: dict[str, Any] = {}
        self._fds: list[int] = []

    def fail(self, reason: str, *, status: int | None = None, signal: int | None = None) -> None:
        """The next update or rehearsal fails for this reason, as if the new program ended so."""
        wait_status = signal if signal is not None else None
        if status is not None:
            wait_status = status << WAIT_STATUS_SHIFT
        self._failure = UpdateError(reason, wait_status)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
        """Calls it, up to an update that succeeds; whether there was one."""
        try:
            function(*arguments, **options)
        except Executed:
            return True
        return False

    def restart(self) -> None:
        """The new program starts: it has the names and the state, and no predecessor's objects.

        Raises RuntimeError where no update has succeeded.
        """
        if self._old is None:
            raise RuntimeError("no update has succeeded")
        old, self._old, self.committed = self._old, None, False
        new = image.Image(old.folder)
        new.adopt(_Link(self), self._body, self._fds)
        self._fds = []
        image.replace(new)

    def execute(self, current: session.Session) -> None:
        """In place of the exec and all that follows; comes back from a rehearsal only."""
        failure, self._failure = self._failure, None
        header: list[Any] = []
        rest: list[Any] = []
        current._send_header(lambda kind, body, fds: header.extend((body, fds)))
        current._send_rest(lambda kind, body, fds: rest.extend((body, list(map(os.dup, fds)))))
        if failure is not None or current.rehearsing:
            for fd in rest[1]:
                os.close(fd)
            if failure is not None:
                raise failure
            return
        body, fds = rest
        names = [name for name in body["names"] if name not in body["fresh"]]
        fds += [os.dup(current._said.sent[name].fd) for name in names]
        body["fresh"] += names
        self._body, self._fds = {**header[0], **body}, fds
        self.argv, self.env, self.mode = current.argv, current.env, current.mode
        self.updates += 1
        self._old = image.current()
        raise Executed


class _Link:
    """The predecessor of a new program in a test."""

    mode = arguments.EARLY  # all has come at once: nothing is queued

    def __init__(self, process: Process) -> None:
        self._process = process

    def commit(self) -> None:
        self._process.committed = True

    def refuse(self, reason: str) -> None:
        raise UpdateError(reason)


@contextlib.contextmanager
def fake() -> Iterator[Process]:
    """This process as one that has just started, without names; as it was before, afterwards."""
    process = Process()
    before = image.replace(image.Image(os.getcwd()))
    session.fake = process.execute
    try:
        yield process
    finally:
        session.fake = None
        image.replace(before)
