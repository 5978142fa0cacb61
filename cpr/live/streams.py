"""Connections of asyncio streams that can be stopped where nothing is lost, and go over.

A handler is at rest where it waits for input, or, if it has set `writer.saved`, in `drain`: its
place is then told by the buffered bytes and by what it has saved.  So it is in `wait_closed` after
`close`: the next program sends what is left.  An update waits until all are at rest.  Meanwhile
nothing is read from the socket, and `drain` lets a handler that has saved nothing through to its
next read: what it has written by then goes over.  Where the client has MOST_PENDING to take it
waits as ever, for nobody knows its place in an answer that is longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, cast

from cpr.live import image
from cpr.live.payload import Reader, Writer

MOST_PENDING = 16 << 20  # bytes


class _StreamReader(asyncio.StreamReader):
    """One that has what it has received in its buffer until it is given away, so that it goes over:
    asyncio's `read` without a size collects it elsewhere."""

    async def read(self, n: int = -1) -> bytes:
        if n >= 0:
            return await super().read(n)
        while not self._eof:  # type: ignore[attr-defined]
            if (error := self.exception()) is not None:
                raise error
            await self._wait_for_data("read")  # type: ignore[attr-defined]
        return await super().read(len(self._buffer))  # type: ignore[attr-defined]


class StreamWriter(asyncio.StreamWriter):
    """`saved`: what the next program's handler gets; bytes, or what JSON can carry."""

    saved: Any = None
    connection: Connection

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket":
            self.connection.shares_socket = True
        return super().get_extra_info(name, default)

    async def drain(self) -> None:
        connection = self.connection
        if (error := connection.reader.exception()) is not None:
            raise error
        if self.transport.is_closing():
            await asyncio.sleep(0)
        connection.draining += 1
        try:
            while True:
                if connection.lost:
                    raise ConnectionResetError("Connection lost")
                if not connection.full and not connection.stopped:
                    return
                if self.saved is None and connection.stopped and not connection.is_clogged():
                    await asyncio.sleep(0)
                    return
                await connection.changed()
        finally:
            connection.draining -= 1

    async def wait_closed(self) -> None:
        self.connection.closing += 1
        try:
            await super().wait_closed()
        finally:
            self.connection.closing -= 1


class _Gate:
    """What a StreamReader takes for its transport: it reads nothing while it is stopped."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.wanted = True

    def pause_reading(self) -> None:
        self.wanted = False
        cast(asyncio.ReadTransport, self._connection.transport).pause_reading()

    def resume_reading(self) -> None:
        self.wanted = True
        if not self._connection.stopped:
            cast(asyncio.ReadTransport, self._connection.transport).resume_reading()


class _Protocol(asyncio.StreamReaderProtocol):
    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(connection.reader, loop=loop)
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connection.transport = cast(asyncio.Transport, transport)
        self._connection.reader._transport = self._connection.gate  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        # Else the client sees no end: the new program has a copy.
        if image.current().updating and not self._connection.shares_socket:
            with contextlib.suppress(OSError):
                self._connection.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        super().connection_lost(exc)
        self._connection.lost = True
        self._connection.wake()
        self._connection.on_lost(self._connection)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._connection.full = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self._connection.full = False
        self._connection.wake()


class Connection:
    """One accepted connection: its name, its streams, and whether it is at rest."""

    def __init__(self, name: str, limit: int, on_lost: Any) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        self.reader = _StreamReader(limit=limit, loop=self.loop)
        self.writer: StreamWriter
        self.transport: asyncio.Transport
        self.gate = _Gate(self)
        self.on_lost = on_lost
        self.task: asyncio.Task[None] | None = None
        self.stopped = self.full = self.lost = self.shares_socket = False
        self.draining = self.closing = 0
        self._waiting: list[asyncio.Future[None]] = []

    async def open(self, sock: Any, data: bytes = b"", pending: bytes = b"") -> None:
        """Attaches the socket, which is the transport's from now on.  Raises OSError.

        `data` has been received and not read, `pending` written and not sent.
        """
        protocol = _Protocol(self, self.loop)
        if data:
            self.reader.feed_data(data)
        await self.loop.connect_accepted_socket(lambda: protocol, sock)
        self.writer = StreamWriter(self.transport, protocol, self.reader, self.loop)
        self.writer.connection = self
        if pending:
            self.transport.write(pending)

    def is_clogged(self) -> bool:
        """The client has more to take than a handler may add to for the sake of an update."""
        return self.full and self.transport.get_write_buffer_size() >= MOST_PENDING

    def is_at_rest(self) -> bool:
        if self.task is None or self.task.done() or self.lost:
            return True
        if self.closing and self.transport.is_closing():
            return True  # all that is left is to be sent
        if self.draining:
            return self.writer.saved is not None
        return self.reader._waiter is not None  # type: ignore[attr-defined]

    def stop(self) -> None:
        """Nothing is read any more."""
        self.stopped = True
        if self.gate.wanted and not self.transport.is_closing():
            self.transport.pause_reading()
        self.wake()

    def resume(self) -> None:
        self.stopped = False
        if self.gate.wanted and not self.transport.is_closing():
            self.transport.resume_reading()
        self.wake()

    async def changed(self) -> None:
        future = self.loop.create_future()
        self._waiting.append(future)
        await future

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def save(self, writer: Writer) -> dict[str, Any]:
        """What the next program needs besides the socket.  Raises UpdateError."""
        buffer = self.transport._buffer  # type: ignore[attr-defined]  # there is no other way
        pending = bytes(buffer) if isinstance(buffer, bytearray) else b"".join(buffer)
        ended = self.transport.is_closing() or self.task is None or self.task.done()
        return {
            "data": writer.add(self.reader._buffer),  # type: ignore[attr-defined]
            "pending": writer.add(pending),
            "saved": writer.add_value(self.writer.saved, f"what '{self.name}' has saved"),
            "ended": ended,
            "eof": bool(self.transport._eof),  # type: ignore[attr-defined]
        }

    async def restore(self, sock: Any, saved: dict[str, Any], reader: Reader) -> bool:
        """Attaches what `save` has described; false: there is nothing left but to send."""
        await self.open(sock, reader.get(saved["data"]), reader.get(saved["pending"]))
        self.writer.saved = reader.get_value(saved["saved"])
        if saved["eof"]:
            self.writer.write_eof()
        if saved["ended"]:
            self.writer.close()
        return not saved["ended"]
