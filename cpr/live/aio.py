"""asyncio: an update that the loop waits for, and a server whose connections go over.

    async def on_client(reader, writer, *, resumed=False, saved=None):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def main():
        server = await live.aio.start_server("echo", on_client, port=7000)
        live.update_on(signal.SIGHUP)
        live.ready()
        await server.serve_forever()

The streams are those of asyncio's selector loop, without TLS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from cpr.live import arguments, executor, hooks, notify, session
from cpr.live.aio_server import Server, servers, start_server
from cpr.live.errors import UpdateError, cause_of
from cpr.live.last_words import BOUND_MS
from cpr.live.streams import StreamWriter
from cpr.live.token import is_readable

__all__ = ["Server", "StreamWriter", "on_resume", "on_stop", "start_server", "update"]
STEP = 0.001  # s

_stopping: list[Callable[[], Awaitable[Any]]] = []
_resuming: list[Callable[[], Any]] = []
_tasks: set[asyncio.Task[Any]] = set()
_stopped = False


async def update(
    argv: Sequence[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
    mode: str = arguments.EARLY,
    guard: str = arguments.FORK,
    allow: Iterable[str] = (),
    back: bool = False,
) -> NoReturn:
    """As `live.update`; the loop runs on while the new program starts, unless the mode is late.

    Before the hand-over the servers of `start_server` stop reading and accepting, and each handler
    goes on until it is at rest.  What the loop's default executor does is waited for too, and
    before the exec; what it is given meanwhile is done after that.
    """
    current = session.Session(argv, env, timeout, mode, guard, allow, back)
    loop = asyncio.get_running_loop()
    try:
        notify.reloading()
        current.pause()
        if mode == arguments.LATE:
            await _stop(current)
        await executor.end(loop, current)
        current.check()
        current.start()
        while True:
            current.resume()
            _resume()
            await _wait(loop, current)
            current.pause()
            await _stop(current)
            await executor.end(loop, current)
            current.hand_over()
    except Exception as error:
        failure = current.fail(error)
        _go_on(loop)
        raise failure from cause_of(error)
    except BaseException as error:
        current.fail(error)
        _go_on(loop)
        raise


def on_stop(function: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """`function` is awaited before the hand-over, when the servers of this module read no more.

    It stops a server of another kind, or waits for tasks that handlers have started.
    """
    _stopping.append(function)
    return function


def on_resume(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` starts it again, where this program goes on after an on_stop."""
    _resuming.append(function)
    return function


async def _wait(loop: asyncio.AbstractEventLoop, current: session.Session) -> None:
    """Until the new program is ready, while the loop serves."""
    sock, pidfd = current.fds()
    watched = [sock, pidfd]
    changed = asyncio.Event()
    for fd in watched:
        loop.add_reader(fd, changed.set)
    try:
        while True:
            try:
                left = min(current.remaining(), BOUND_MS / 1000)
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                if not current.remaining():
                    current.raise_late()
            changed.clear()
            if sock in watched and _has_hung_up(current):
                watched.remove(sock)  # it has hung up, and is readable for ever
                loop.remove_reader(sock)
            if current.wait(block=False):
                return
    finally:
        for fd in watched:
            loop.remove_reader(fd)


def _has_hung_up(current: session.Session) -> bool:
    """Whether the socket is readable, and nothing is there to be read."""
    return is_readable(current.fds()[0]) and not current.has_message()


async def _stop(current: session.Session) -> None:
    """Until all handlers are at rest.  Raises UpdateError naming one that does not come to it."""
    global _stopped
    _stopped = True
    _stop_reading()
    for function in _stopping:
        await _call_on_stop(function, current)
    while True:
        _stop_reading()  # of connections that were just being accepted, too
        names = [each.name for server in servers for each in server.busy()]
        if not names:
            return
        current.check_new()
        if current.remaining() == 0:
            raise UpdateError(
                f"the handler of '{names[0]}' is in the middle of something since "
                f"{current.timeout:g} s: it neither waits for input nor, where it waits in "
                "writer.drain(), has set writer.saved"
            )
        await asyncio.sleep(STEP)


def _stop_reading() -> None:
    for server in servers:
        server.stop()


async def _call_on_stop(function: Callable[[], Awaitable[Any]], current: session.Session) -> None:
    """Raises UpdateError where it fails or takes too long, or the new program ends meanwhile."""
    try:
        task = asyncio.ensure_future(function())
    except Exception as error:
        raise hooks.failed("on_stop", function, error) from error
    try:
        while not task.done():
            current.check_new()
            if current.remaining() == 0:
                raise UpdateError(
                    f"{hooks.name_of(function)}, of on_stop, takes more than {current.timeout:g} s"
                )
            await asyncio.wait([task], timeout=min(current.remaining(), BOUND_MS / 1000))
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    try:
        task.result()
    except Exception as error:
        raise hooks.failed("on_stop", function, error) from error


def _resume() -> None:
    global _stopped
    executor.release()
    for server in servers:
        server.resume()
    if _stopped:
        _stopped = False
        hooks.call_all("aio.on_resume", _resuming)


def _go_on(loop: asyncio.AbstractEventLoop) -> None:
    """`_resume` after a failure, which comes first: what fails here is for the loop to tell."""
    try:
        _resume()
    except UpdateError as error:
        context = {"message": "a function of aio.on_resume failed", "exception": error.__cause__}
        loop.call_exception_handler(context)


def schedule(
    loop: asyncio.AbstractEventLoop,
    report: Callable[[UpdateError], Any],
    argv: Sequence[str] | None,
    options: Mapping[str, Any],
) -> None:
    """For a signal handler: an update by the loop that runs."""

    async def run() -> None:
        try:
            await update(argv, **options)
        except UpdateError as error:
            report(error)

    def create() -> None:
        task = loop.create_task(run())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    loop.call_soon_threadsafe(create)
