"""The names of `cpr.live` that a program uses; the package has them all."""

from __future__ import annotations

import logging
import signal as signals
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast, overload

from cpr.live import NAMES, auditing, image, memfd, notify, preserved, session
from cpr.live.auditing import Finding
from cpr.live.errors import PreserveError, UpdateError
from cpr.live.image import Previous

if TYPE_CHECKING:
    import mmap
    import socket as sockets

__all__ = list(NAMES)
Function = TypeVar("Function", bound=Callable[[], Any])
log = logging.getLogger("cpr.live")


def socket(name: str, make: Callable[[], sockets.socket]) -> sockets.socket:
    """The preserved socket of that name, else what `make` returns, preserved from now on.

    One that systemd has passed under that name (LISTEN_FDNAMES) is taken before `make` is asked.
    The socket is the caller's.  Raises PreserveError for a name used twice, and what `make` raises.
    """
    return cast("sockets.socket", _find_or_make(name, preserved.SOCKET, make))


def file(name: str, make: Callable[[], IO[Any]]) -> IO[Any]:
    """The same for a file object: the next program's stands at the same place.

    A file of a class of its own, such as a compressed one, is preserved by its descriptor only.
    """
    return cast("IO[Any]", _find_or_make(name, preserved.FILE, make))


def fd(name: str, make: Callable[[], int]) -> int:
    """The same for a descriptor, which the caller owns and closes."""
    return cast(int, _find_or_make(name, preserved.FD, make))


def _find_or_make(name: str, kind: str, make: Callable[[], Any]) -> Any:
    this = image.current()
    this.connect()
    preserved.check_name(name)
    if this.registry.find(name) is None:
        this.take_over()  # the previous program may have made it since
    if this.registry.find(name) is None:
        notify.take_listening(this.registry, name, kind)
    value = preserved.find_or_make(this.registry, name, kind, make)
    notify.store(name)
    return value


def keep(name: str, obj: Any) -> None:
    """Preserves a socket, a file or a descriptor, which stays the caller's, until `drop`.

    Raises PreserveError for a name used twice, or an object that is closed.
    """
    this = image.current()
    this.take_over()
    this.registry.keep(name, obj)


def drop(name: str) -> None:
    """Forgets a name; what it stands for stays open, and the caller's.  Raises PreserveError."""
    this = image.current()
    this.take_over()
    this.registry.drop(name)
    notify.remove(name)


def names(prefix: str = "") -> list[str]:
    """The preserved names that begin with `prefix`, sorted."""
    this = image.current()
    this.take_over()
    return sorted(name for name in this.registry.entries if name.startswith(prefix))


def get(name: str) -> Any:
    """What is preserved under that name, the caller's; the same object each time.

    Raises PreserveError for a name that is not there.
    """
    this = image.current()
    this.take_over()
    if this.registry.find(name) is None:
        raise PreserveError(f"'{name}' is no preserved name")
    return this.registry.take(name)


def memory(name: str, size: int, *, huge: bool = False, grow: bool = False) -> mmap.mmap:
    """A shared mapping of `size` bytes: zero at first, the same bytes in the next program.

    `huge` takes huge pages, of which `size` must be a multiple.  Raises PreserveError for a name
    used twice, for another size than before unless `grow` and larger, and where there is no memory.
    Until `ready` the previous program has the right to these bytes too: do not write before.
    """
    this = image.current()
    this.take_over()
    this.registry.claim(name)
    entry = this.registry.find(name)
    if entry is None:
        number = memfd.create(name, size, huge)
        entry = preserved.Entry(preserved.MEMORY, number, None, {})
        this.registry.add(name, entry)
    elif entry.kind == preserved.MEMORY:
        memfd.resize(name, entry.fd, size, grow)
    try:
        return cast("mmap.mmap", this.registry.take(name, preserved.MEMORY))
    except PreserveError:
        if this.previous is None:
            this.registry.drop(name)
        raise


@overload
def on_save(function: Function, *, version: int = ...) -> Function: ...
@overload
def on_save(*, version: int = ...) -> Callable[[Function], Function]: ...
def on_save(function: Any = None, *, version: int = 1) -> Any:
    """`function` is called last thing before the hand-over, and returns the state.

    That is bytes, or what JSON can carry; `version` says which form it has.  There is one function:
    a later call replaces it.  It is called for a rehearsal and for an update that fails, too.  Can
    be used as a decorator.
    """

    preserved.check_version(version)

    def register(given: Any) -> Any:
        if not callable(given):
            raise TypeError(f"live.on_save: {given!r} cannot be called")
        image.current().saver = given
        image.current().save_version = version
        return given

    return register if function is None else register(function)


def state(default: Any = None, *, version: int = 1) -> Any:
    """What the previous program's function of on_save has returned, or `default`.

    The previous program stops serving here.  `version` is the latest that this program knows; a
    later one ends this program, the previous one goes on, and its UpdateError has both versions.
    """
    preserved.check_version(version)
    return image.current().state(default, version)


def on_pause(function: Function) -> Function:
    """`function` ends this program's threads: called before an exec, and before a hand-over."""
    image.current().pausing.append(function)
    return function


def on_resume(function: Function) -> Function:
    """`function` starts them again: called where this program goes on after an on_pause."""
    image.current().resuming.append(function)
    return function


def ready() -> None:
    """Commits: everything is this program's now, and the previous one ends.

    Without a previous program it says READY to systemd, if there is one, and nothing else.  Raises
    UpdateError where the previous program has taken everything back: this one has nothing then.
    """
    this = image.current()
    updated = this.is_starting
    this.commit()
    notify.started(updated)


def update(
    argv: Sequence[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
    mode: str = session.EARLY,
    guard: str = session.FORK,
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
        current.pause()
        current.check()
        notify.reloading()
        current.start()
        while True:
            current.resume()
            while not current.wait():
                pass
            current.pause()
            current.hand_over()
    except Exception as error:
        failure = current.fail(error)
        notify.failed()
        raise failure from (None if isinstance(error, UpdateError) else error)
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
    reason = ""
    code: int | None = None
    try:
        current.spawn()
        while not current.wait():
            pass
    except Exception as error:
        reason = getattr(error, "reason", str(error))
        code = getattr(error, "wait_status", None)
    finally:
        ended, lines = current.end_rehearsal()
    if not reason:
        return Verdict(True, "", None, None, lines)
    if code is not None and ended is not None:
        signo = -ended if ended < 0 else None
        return Verdict(False, reason, None if signo else ended, signo, lines)
    return Verdict(False, reason, None, None, lines)


def audit() -> list[Finding]:
    """What an update would lose or leak, each with what becomes of it; empty is best."""
    return auditing.audit(image.current())


def update_on(
    signum: int,
    argv: Sequence[str] | None = None,
    *,
    on_error: Callable[[UpdateError], Any] | None = None,
    **options: Any,
) -> None:
    """Updates at that signal; `options` are those of `update`.

    An error goes to `on_error`, else to the logger cpr.live.  Where an asyncio loop runs it is
    live.aio.update that is called.  Raises ValueError outside the main thread, and for a signal
    that nobody can catch.
    """

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

            aio.schedule(loop, report, argv, options)
            return
        try:
            update(argv, **options)
        except UpdateError as error:
            report(error)

    try:
        signals.signal(signum, handle)
    except OSError as error:
        raise ValueError(f"no update can be made at signal {signum}: {error.strerror}") from None
    signals.siginterrupt(signum, False)
    session.update_signals.add(int(signum))


def generation() -> int:
    this = image.current()
    this.connect()
    return this.generation


def predecessor() -> Previous | None:
    this = image.current()
    this.connect()
    return this.previous
