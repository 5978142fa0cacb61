"""The asyncio server of `aio`: its listening socket and its connections go over by name."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable
from typing import Any

from cpr.live import api, image, listening
from cpr.live.streams import Connection

LIMIT = 1 << 16  # bytes, as in asyncio
AT_ONCE = 100  # connections that are accepted before anything else runs

servers: list[Server] = []
"""All that are not closed, and those with connections."""


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
        self._accepting = self._begun = False
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
        """Closes the listening socket; connections go on, and over to the next program."""
        if self._closed.done():
            return
        self._closed.set_result(None)
        self._set_accepting(False)
        try:
            api.drop(self.name)
        except ValueError:
            pass
        self._listener.close()
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._begun and self._closed.done() and not self._connections and self in servers:
            servers.remove(self)
            this = image.current()
            this.obstacles.remove(self._obstacle)
            if all(each.name != self.name for each in servers):
                this.parts.pop(_part_of(self.name), None)

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
            name = self._next_name()
            image.current().registry.keep(name, sock)
            self._start(name, sock, None, None)

    def _next_name(self) -> str:
        """One that no connection has, of an earlier server of this name neither."""
        while True:
            self._serial += 1
            name = f"{self.name}:{self._serial}"
            if image.current().registry.find(name) is None:
                return name

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
            self._end_if_idle()

    # An update.

    def busy(self) -> list[Connection]:
        return [each for each in self._connections.values() if not each.is_at_rest()]

    def stop(self) -> None:
        self._set_accepting(False)
        for connection in self._connections.values():
            if hasattr(connection, "writer") and not connection.stopped:
                connection.stop()

    def resume(self) -> None:
        self._set_accepting(not self._closed.done())
        for connection in self._connections.values():
            if hasattr(connection, "writer") and connection.stopped:
                connection.resume()

    def _obstacle(self) -> str | None:
        if busy := self.busy():
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
        found = this.part(_part_of(self.name))
        if found is not None:
            described, reader = found
            for name, saved in described.items():
                self._serial = max(self._serial, int(name.rpartition(":")[2]))
                self._start(name, this.registry.take(name), saved, reader)
        self._begun = True
        self._listener.setblocking(False)  # the previous program has it too, until here
        self._set_accepting(not self._closed.done())
        self._end_if_idle()


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

    That is a TCP socket of `host` and `port`, a Unix socket of `path`, where a socket's file that
    nobody listens at is replaced, or `sock`, which becomes the server's.  It accepts when
    `live.ready` has been called, or at once in a first program.

    A connection of the previous program comes back with its buffered bytes: `on_client` is called
    again, with the keywords `resumed=True` and `saved=`, what the handler had set as
    `writer.saved`; either is left out if the function does not take it.  A handler that sets
    nothing is called again only where it was waiting for input.  The connection is closed when the
    handler returns.  One whose server the next program does not start before its `ready` is closed
    there.

    A host name is one address, and the first of IPv4; for several, or an option of the socket's,
    make it yourself, and pass it as `sock`.  There is no TLS.

    Raises OSError where the socket cannot be made, PreserveError for a name used twice.
    """

    def make() -> socket.socket:
        if sock is not None:
            return sock
        return listening.listen(host or "", port or 0, path, backlog)

    this = image.current()
    listener = api.socket(name, make)
    if sock is not None and sock is not listener:
        sock.close()
    server = Server(name, on_client, listener, limit)
    servers.append(server)
    this.parts[_part_of(name)] = lambda writer: _save(name, writer)
    this.obstacles.append(server._obstacle)
    if this.is_starting:
        loop = asyncio.get_running_loop()
        this.committing.append(lambda: loop.call_soon_threadsafe(server._begin))
    else:
        server._begin()
    return server


def _part_of(name: str) -> str:
    return f"aio:{name}"


def _save(name: str, writer: Any) -> dict[str, Any]:
    """The connections of all servers of that name: one that was closed may have some still."""
    saved: dict[str, Any] = {}
    for server in servers:
        if server.name == name:
            saved.update(server._save(writer))
    return saved


def _keywords(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return {"resumed", "saved"}
    return {each.name for each in parameters} & {"resumed", "saved"}
