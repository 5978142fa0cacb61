"""The names of `cpr.live` that a program uses; the package has them all.

Here is what is preserved and saved; `updating` has the update itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast, overload

from cpr.live import NAMES, auditing, image, memfd, notify, preserved
from cpr.live.auditing import Finding
from cpr.live.errors import PreserveError
from cpr.live.errors import UpdateError as UpdateError
from cpr.live.image import Previous
from cpr.live.updating import Verdict as Verdict
from cpr.live.updating import rehearse as rehearse
from cpr.live.updating import update as update
from cpr.live.updating import update_on as update_on

if TYPE_CHECKING:
    import mmap
    import socket as sockets

__all__ = list(NAMES)
Function = TypeVar("Function", bound=Callable[[], Any])


def socket(name: str, make: Callable[[], sockets.socket]) -> sockets.socket:
    """The preserved socket of that name, else what `make` returns, preserved from now on.

    One that systemd has passed under that name (LISTEN_FDNAMES) is taken before `make` is asked.
    The socket is the caller's.  Raises PreserveError for a name used twice, and what `make` raises.
    """
    return cast("sockets.socket", _find_or_make(name, preserved.SOCKET, make))


def file(name: str, make: Callable[[], IO[Any]]) -> IO[Any]:
    """The same for a file object: the next program's stands at the same place.

    Raises PreserveError also for one that reads ahead what it cannot give back: a pipe, a terminal.
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
    _when_ours(lambda: notify.store(name))
    return value


def _when_ours(action: Callable[[], Any]) -> None:
    """Does what outlives this program: now, or at `ready`, which a rehearsal does not come to."""
    this = image.current()
    if this.is_starting:
        this.committing.append(action)
    else:
        action()


def keep(name: str, obj: Any) -> None:
    """Preserves a socket, a file or a descriptor, which stays the caller's, until `drop`.

    Raises PreserveError for a name used twice, or an object that is closed; for a file as `file`
    does, and for a socket of TLS.
    """
    this = image.current()
    this.take_over()
    this.registry.keep(name, obj)


def drop(name: str) -> None:
    """Forgets a name; what it stands for stays open, and the caller's.  Raises PreserveError."""
    this = image.current()
    this.take_over()
    this.registry.drop(name)
    _when_ours(lambda: notify.remove(name))


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
    made = entry is None
    if entry is None:
        number = memfd.create(name, size, huge)
        entry = preserved.Entry(preserved.MEMORY, number, None, {})
        this.registry.add(name, entry)
    elif entry.kind == preserved.MEMORY:
        memfd.resize(name, entry.fd, entry.size, size, grow)
        entry.size = size
    try:
        return cast("mmap.mmap", this.registry.take(name, preserved.MEMORY))
    except PreserveError as error:
        if made:
            this.registry.drop(name)
        if made and huge:
            text = f"{error}: huge pages are missing; sysctl vm.nr_hugepages=N makes some"
            raise PreserveError(text) from None
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
    image.current().commit()


def audit() -> list[Finding]:
    """What an update would lose or leak, each with what becomes of it; empty is best."""
    return auditing.audit(image.current())


def generation() -> int:
    this = image.current()
    this.connect()
    return this.generation


def predecessor() -> Previous | None:
    this = image.current()
    this.connect()
    return this.previous
