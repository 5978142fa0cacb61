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
import inspect
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from cpr.live import api, image, notify, session
from cpr.live.errors import UpdateError
from cpr.live.streams import Connection, StreamWriter

__all__ = ["Server", "StreamWriter", "on_resume", "on_stop", "start_server", "update"]
LIMIT = 1 << 16  # bytes, as in asyncio
STEP = 0.001  # s
AT_ONCE = 100  # connections that are accepted before anything else runs

_servers: list[Server] = []
_stopping: list[Callable[[], Awaitable[Any]]] = []
_resuming: list[Callable[[], Any]] = []
_tasks: set[asyncio.Task[Any]] = set()
_updating = _stopped = False


async def update(
    argv: Sequence[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
    mode: str = session.EARLY,
    guard: str = session.FORK,
    allow: Iterable[str] = (),
) -> NoReturn:
    """As `live.update`; the loop runs on while the new program starts, unless the mode is late.

    Before the hand-over the servers of `start_server` stop reading and accepting, and each handler
    goes on until it is at rest; what the loop's default executor does is waited for, too.
    """
    global _updating
    if _updating:
        raise UpdateError("an update is under way already")
    current = session.Session(argv, env, timeout, mode, guard, allow)
    loop = asyncio.get_running_loop()
    _updating = True
    try:
        current.pause()
        await _end_executor(loop, current)
        current.check()
        notify.reloading()
        if mode == session.LATE:
            await _stop(current)
            current.start()
        else:
            current.start()
            notify.main_pid()
            current.resume()
            await _wait(loop, current)
            current.pause()
            await _stop(current)
            await _end_executor(loop, current)
            current.hand_over()
        raise UpdateError("the new program did not take over")
    except Exception as error:
        failure = current.fail(error)
        _resume()
        notify.failed(failure.pid_changed)
        raise failure from (None if isinstance(error, UpdateError) else error)
    except BaseException as error:
        current.fail(error)
        _resume()
        raise
    finally:
        _updating = False


def on_stop(function: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """`function` is awaited before the hand-over: it stops a server that is not of this module."""
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
                await asyncio.wait_for(changed.wait(), current.remaining())
            except TimeoutError:
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
    import select

    return bool(select.select([current.fds()[0]], [], [], 0)[0]) and not current.has_message()


async def _stop(current: session.Session) -> None:
    """Until all handlers are at rest.  Raises UpdateError naming one that does not come to it."""
    global _stopped
    _stopped = True
    for function in _stopping:
        try:
            await asyncio.wait_for(function(), current.remaining())
        except TimeoutError:
            raise UpdateError(f"{function!r} takes more than {current.timeout:g} s") from None
    while True:
        for server in _servers:
            server._stop()
        names = [each.name for server in _servers for each in server._busy()]
        if not names:
            return
        if current.remaining() == 0:
            raise UpdateError(
                f"the handler of '{names[0]}' is in the middle of something since "
                f"{current.timeout:g} s: it neither waits for input nor has set writer.saved"
            )
        await asyncio.sleep(STEP)


def _resume() -> None:
    global _stopped
    for server in _servers:
        server._resume()
    if _stopped:
        _stopped = False
        for function in _resuming:
            function()


async def _end_executor(loop: Any, current: session.Session) -> None:
    """Waits for the threads of the default executor; the loop makes another when it needs one."""
    executor = getattr(loop, "_default_executor", None)
    if executor is None:
        return
    loop._default_executor = None
    executor.shutdown(wait=False)
    while any(thread.is_alive() for thread in executor._threads):
        if current.remaining() == 0:
            raise UpdateError("the loop's default executor is busy")
        await asyncio.sleep(STEP)


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


class Server:
    """A listening socket and its connections, by name; as asyncio's Server."""

    def __init__(self, name: str, on_client: Callable[..., Any], listener: Any, limit: int) -> None:
        self.name = name
        self._listener = listener
        self._on_client = on_client
        self._keywords = _keywords(on_client)
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._connections: dict[str, Connection] = {}
        self._serial = 0
        self._accepting = False
        self._closed = self._loop.create_future()

    @property
    def sockets(self) -> tuple[Any, ...]:
        return (self._listener,)

    def is_serving(self) -> bool:
        return self._accepting

    async def serve_forever(self) -> None:
        """Until `close`, or until it is cancelled: then it closes."""
        try:
            await asyncio.shield(self._closed)
        finally:
            self.close()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the listening socket; connections go on."""
        if self._closed.done():
            return
        self._closed.set_result(None)
        self._set_accepting(False)
        image.current().parts.pop(f"aio:{self.name}", None)
        if self in _servers:
            _servers.remove(self)
        try:
            api.drop(self.name)
        except ValueError:
            pass
        self._listener.close()

    # The listening socket.

    def _set_accepting(self, on: bool) -> None:
        if on == self._accepting:
            return
        self._accepting = on
        if on:
            self._loop.add_reader(self._listener, self._accept)
        else:
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors: those who wait have to wait
                self._set_accepting(False)
                self._loop.call_later(1, self._set_accepting, not self._closed.done())
                context = {"message": f"accept on '{self.name}' failed", "exception": error}
                self._loop.call_exception_handler(context)
                return
            sock.setblocking(False)
            self._serial += 1
            name = f"{self.name}:{self._serial}"
            image.current().registry.keep(name, sock)
            self._start(name, sock, None, None)

    # Connections.

    def _start(self, name: str, sock: Any, saved: Any, reader: Any) -> None:
        connection = Connection(name, self._limit, self._on_lost)
        self._connections[name] = connection
        connection.task = self._loop.create_task(self._serve(connection, sock, saved, reader))

    async def _serve(self, connection: Connection, sock: Any, saved: Any, reader: Any) -> None:
        try:
            if saved is None:
                await connection.open(sock)
            elif not await connection.restore(sock, saved, reader):
                return
        except OSError:  # the client has gone
            self._on_lost(connection)
            sock.close()
            return
        words = {"resumed": saved is not None, "saved": connection.writer.saved}
        words = {key: value for key, value in words.items() if key in self._keywords}
        try:
            result = self._on_client(connection.reader, connection.writer, **words)
            if inspect.isawaitable(result):
                await result
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as error:
            context = {"message": f"the handler of '{connection.name}' failed", "exception": error}
            self._loop.call_exception_handler(context)
        finally:
            connection.writer.close()

    def _on_lost(self, connection: Connection) -> None:
        if self._connections.pop(connection.name, None) is not None:
            image.current().registry.drop(connection.name)

    # An update.

    def _busy(self) -> list[Connection]:
        return [each for each in self._connections.values() if not each.is_at_rest()]

    def _stop(self) -> None:
        self._set_accepting(False)
        for connection in self._connections.values():
            if hasattr(connection, "writer") and not connection.stopped:
                connection.stop()

    def _resume(self) -> None:
        self._set_accepting(True)
        for connection in self._connections.values():
            if hasattr(connection, "writer") and connection.stopped:
                connection.resume()

    def _obstacle(self) -> str | None:
        if busy := self._busy():
            return f"the handler of '{busy[0].name}' is busy: live.aio.update waits for that"
        return None

    def _save(self, writer: Any) -> dict[str, Any]:
        return {
            name: connection.save(writer)
            for name, connection in self._connections.items()
            if hasattr(connection, "writer")
        }

    def _begin(self) -> None:
        """The process is ours: connections of the previous program first, then new ones."""
        this = image.current()
        found = this.part(f"aio:{self.name}")
        if found is not None:
            described, reader = found
            for name, saved in described.items():
                self._serial = max(self._serial, int(name.rpartition(":")[2]))
                self._start(name, this.registry.take(name), saved, reader)
        if not self._closed.done():
            self._set_accepting(True)


async def start_server(
    name: str,
    on_client: Callable[..., Any],
    host: str | None = None,
    port: int | None = None,
    *,
    path: str | None = None,
    sock: socket.socket | None = None,
    backlog: int = 100,
    limit: int = LIMIT,
) -> Server:
    """Serves `on_client(reader, writer)` on the preserved socket `name`, else on a new one.

    That is a TCP socket of `host` and `port`, a Unix socket of `path`, or `sock`, which becomes the
    server's.  It accepts when `live.ready` has been called, or at once in a first program.

    A connection of the previous program comes back with its buffered bytes: `on_client` is called
    again, with the keywords `resumed=True` and `saved=`, what the handler had set as
    `writer.saved`; either is left out if the function does not take it.  A handler that sets
    nothing is called again only where it was waiting for input.  The connection is closed when the
    handler returns.

    Raises OSError where the socket cannot be made, PreserveError for a name used twice.
    """

    def make() -> socket.socket:
        if sock is not None:
            return sock
        if path is not None:
            made = socket.socket(socket.AF_UNIX)
            made.bind(path)
            made.listen(backlog)
            return made
        family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
        return socket.create_server((host or "", port or 0), family=family, backlog=backlog)

    this = image.current()
    listener = api.socket(name, make)
    listener.setblocking(False)
    if sock is not None and sock is not listener:
        sock.close()
    server = Server(name, on_client, listener, limit)
    _servers.append(server)
    this.parts[f"aio:{name}"] = server._save
    this.obstacles.append(server._obstacle)
    if this.is_starting:
        loop = asyncio.get_running_loop()
        this.committing.append(lambda: loop.call_soon_threadsafe(server._begin))
    else:
        server._begin()
    return server


def _keywords(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return {"resumed", "saved"}
    return {each.name for each in parameters} & {"resumed", "saved"}
