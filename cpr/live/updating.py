"""The update itself, as a program asks for it: now, at a signal, or as a rehearsal."""

from __future__ import annotations

import logging
import signal as signals
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from cpr.live import arguments, notify, session
from cpr.live.errors import UpdateError, cause_of, reason_of

log = logging.getLogger("cpr.live")


def update(
    argv: Sequence[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
    mode: str = arguments.EARLY,
    guard: str = arguments.FORK,
    allow: Iterable[str] = (),
    back: bool = False,
) -> NoReturn:
    """Replaces this program by `argv` under the same PID; never returns on success.

    Without `argv` it is what is running now, from the folder it was started in.  `env` replaces
    the environment.  `timeout` is in seconds, from the call to the new program's `ready`.

    "early" starts the new program and stops only when that is ready to take over: what serves
    meanwhile are threads that `on_resume` starts, or asyncio with `live.aio.update`.  "late" stands
    still from the start.  `guard` is "fork", or "vm" for a process whose memory cannot be copied.
    `allow` names kinds or names of findings of `audit` which are accepted though they are lost.

    Raises UpdateError where the new program does not come up: this one goes on with all it had,
    in another process if `pid_changed`.  With `back`, where the new program has refused by a
    version or for want of descriptors, and no file of this program has changed since it started,
    its command is executed under the PID instead, takes over as a new program does, and finds the
    reason in `live.predecessor.failure`.
    """
    current = session.Session(argv, env, timeout, mode, guard, allow, back)
    try:
        notify.reloading()
        current.pause()
        current.check()
        current.start()
        while True:
            current.resume()
            while not current.wait():
                pass
            current.pause()
            current.hand_over()
    except Exception as error:
        failure = current.fail(error)
        raise failure from cause_of(error)
    except BaseException as error:
        current.fail(error)
        raise


class Verdict(NamedTuple):
    """Whether a rehearsal went as far as `ready`; true or false.

    `reason` is empty, or why not; `status` the exit status of a program that ended by itself,
    `signal` the signal that ended it, `stderr` its last lines.
    """

    ok: bool
    reason: str
    status: int | None
    signal: int | None
    stderr: list[str]

    def __bool__(self) -> bool:
        return self.ok


def rehearse(
    argv: Sequence[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
) -> Verdict:
    """Starts the new program as a child, up to its `ready`, and ends it: nothing is handed over.

    It gets copies of the descriptors and of the state, and writes to shared memory as to a private
    copy.  `timeout` is in seconds.  Raises UpdateError only for what is wrong here.
    """
    current = session.Session(argv, env, timeout)
    ended: tuple[str, int | None, int | None] = ("", None, None)
    try:
        current.spawn()
        while not current.wait():
            pass
    except UpdateError as error:
        ended = (error.reason, error.status, error.signal)
    except Exception as error:
        ended = (reason_of(error), None, None)
    finally:
        lines = current.end_rehearsal()
    return Verdict(not ended[0], *ended, lines)


def update_on(
    signum: int,
    argv: Sequence[str] | None = None,
    *,
    on_error: Callable[[UpdateError], Any] | None = None,
    **options: Any,
) -> None:
    """Updates at that signal; `options` are those of `update`.

    An error goes to `on_error`, else to the logger cpr.live.  Where an asyncio loop runs it is
    live.aio.update that is called.  In a child that was forked the signal is such an error.  Raises
    ValueError outside the main thread, and for a signal that nobody can catch, TypeError for an
    option that `update` has not, UpdateError for a value that it does not take.
    """
    if unknown := sorted(options.keys() - set(arguments.Options._fields)):
        raise TypeError(f"live.update has no option {unknown[0]}={options[unknown[0]]!r}")
    checked = arguments.check(argv, **options)._asdict()
    argv = checked.pop("argv")

    def report(error: UpdateError) -> None:
        if on_error is not None:
            on_error(error)
        else:
            log.error("the update failed: %s", error)

    def handle(number: int, frame: Any) -> None:
        events = sys.modules.get("asyncio.events")
        loop = events._get_running_loop() if events is not None else None
        if loop is not None:
            from cpr.live import aio

            aio.schedule(loop, report, argv, checked)
            return
        try:
            update(argv, **checked)
        except UpdateError as error:
            report(error)

    try:
        signals.signal(signum, handle)
    except OSError as error:
        raise ValueError(f"no update can be made at signal {signum}: {error.strerror}") from None
    signals.siginterrupt(signum, False)
    session.update_signals.add(int(signum))
