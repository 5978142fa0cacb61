"""The asyncio server: what handlers find again, and a loop that goes on after a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

LINES = """
import asyncio, signal
new = len(sys.argv) > 1

async def on_client(reader, writer, *, resumed=False, saved=None):
    count = saved["count"] if resumed else 0
    writer.write(f"hello {live.generation} {resumed} {count}\\n".encode())
    writer.saved = {"count": count}
    while line := await reader.readline():
        await asyncio.sleep(0.05)  # in the middle of a request: an update waits
        count += 1
        writer.saved = {"count": count}
        writer.write(b"%d %s" % (count, line))
        await writer.drain()

async def main():
    server = await live.aio.start_server("lines", on_client, path="lines.sock")
    live.ready()
    if new:
        await server.serve_forever()
    loop = asyncio.get_running_loop()
    client = await asyncio.open_unix_connection("lines.sock")
    say("first", (await client[0].readline()).decode())
    client[1].write(b"a\\nb\\npart")
    say("answer", (await client[0].readline()).decode())

    # The client is to outlive this program: a child has it, and nobody waits for that.
    sock = client[1].get_extra_info("socket")
    other, pid = os.dup(sock.fileno()), os.getpid()
    for argv, words in ((["/bin/false"], {}), (["/bin/sleep", "9"], {"timeout": 0.5})):
        await loop.run_in_executor(None, int)
        beats = 0
        async def beat():
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0.01)
        task = asyncio.create_task(beat())
        try:
            await live.aio.update(argv, **words)
        except live.UpdateError as error:
            say("failed", error.reason, error.pid_changed, beats > 5)
        assert {task, asyncio.current_task()} < asyncio.all_tasks()
        task.cancel()
    say("second", (await client[0].readline()).decode())
    assert asyncio.get_running_loop() is loop
    assert await loop.run_in_executor(None, int) == 0
    got = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, got.set)
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.wait_for(got.wait(), 10)
    pids = await asyncio.create_subprocess_exec("/bin/true")
    assert await pids.wait() == 0

    if os.fork() == 0:
        import socket
        sock = socket.socket(fileno=other)
        sock.setblocking(True)
        with sock.makefile("rwb") as file:
            say("resumed", file.readline().decode())
            file.write(b"ial\\n")
            file.flush()
            say("third", file.readline().decode())
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("lines.sock")
            with sock.makefile("rwb") as file:
                say("fresh", file.readline().decode())
        say("pid", os.getppid())
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    say("old pid", os.getpid())
    await live.aio.update([PYTHON, __file__, "new"])

asyncio.run(main())
"""


def test_connections_buffers_and_what_was_saved_go_over(tmp_path: Path) -> None:
    result = run(tmp_path, LINES)
    found = {line[0]: line[1:] for line in result.lines}
    assert found.get("first") == ["hello 0 False 0\n"], result.stderr
    assert found["answer"] == ["1 a\n"] and found["second"] == ["2 b\n"]
    failed = result.of("failed")
    assert "exit status 1" in failed[0][0] and failed[0][1]
    assert "did not take over within 0.5 s" in failed[1][0] and failed[1][1:] == [True, True]
    assert found["resumed"] == ["hello 1 True 2\n"], result.stderr
    assert found["third"] == ["3 partial\n"]
    assert found["fresh"] == ["hello 1 False 0\n"]
    assert found["pid"] == found["old pid"]


BUSY = """
import asyncio

async def on_client(reader, writer):
    await reader.readexactly(1)
    await asyncio.sleep(60)

async def main():
    await live.aio.start_server("busy", on_client, path="busy.sock")
    live.ready()
    reader, writer = await asyncio.open_unix_connection("busy.sock")
    writer.write(b"x")
    await asyncio.sleep(0.1)
    for update in (live.aio.update, None):
        try:
            if update is None:
                live.update([PYTHON, "-c", "from cpr import live; live.ready()"])
            await update([PYTHON, "-c", "from cpr import live; live.ready()"], timeout=1)
        except live.UpdateError as error:
            say("failed", error.reason)
    task = asyncio.create_task(live.aio.update(["/bin/sleep", "9"]))
    await asyncio.sleep(0.1)
    try:
        await live.aio.update(["/bin/true"])
    except live.UpdateError as error:
        say("failed", error.reason)
    task.cancel()
    await asyncio.wait([task])
    say("cancelled", task.cancelled(), live.names())

asyncio.run(main())
"""


def test_a_handler_that_does_not_rest_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, BUSY)
    reasons = [line[0] for line in result.of("failed")]
    assert len(reasons) == 3, result.stderr
    assert "the handler of 'busy:1' is in the middle" in reasons[0]
    assert "the handler of 'busy:1' is busy" in reasons[1]
    assert "under way" in reasons[2]
    assert result.of("cancelled") == [[True, ["busy", "busy:1"]]]


SLOW = """
import asyncio

async def on_client(reader, writer, *, saved=None):
    sent = saved or 0
    while sent < 400:
        writer.write(b"%06d" % sent * 10000)
        sent += 1
        writer.saved = sent
        await writer.drain()

async def main():
    server = await live.aio.start_server("slow", on_client, path="slow.sock")
    live.ready()
    say("generation", live.generation)
    if live.generation:
        await asyncio.sleep(0.05)
        await live.aio.update()
    elif os.fork() == 0:
        import socket
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("slow.sock")
            got = 0
            with sock.makefile("rb") as file:
                for number in range(400):
                    assert file.read(60000) == b"%06d" % number * 10000, number
                    time.sleep(0.003)
                say("end", file.read(1) == b"")
        os.kill(os.getppid(), 9)
        os._exit(0)
    else:
        await asyncio.sleep(0.2)
        await live.aio.update()
    await server.serve_forever()

asyncio.run(main())
"""


def test_a_writer_that_saves_its_place_goes_on_there(tmp_path: Path) -> None:
    result = run(tmp_path, SLOW)
    assert result.of("end") == [[True]], result.stderr
    assert len(result.of("generation")) > 1


CLOSED = """
import asyncio, socket
late = len(sys.argv) > 1
live.on_save(lambda: live.generation)

async def on_client(reader, writer):
    while line := await reader.readline():
        writer.write(b"%d %s" % (live.generation, line))
        await writer.drain()

async def ask(sock, line):
    await asyncio.get_running_loop().sock_sendall(sock, line)
    return (await asyncio.get_running_loop().sock_recv(sock, 100)).decode()

async def main():
    if live.generation < 2:
        server = await live.aio.start_server("web", on_client, path="web.sock")
        live.ready()
    else:
        live.ready()
        say("without", live.get("client:0").recv(9).decode(), live.names())
        if late:
            server = await live.aio.start_server("web", on_client, path="web.sock")
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            client.connect("web.sock")
            say("late", await ask(client, b"c\\n"))
        return
    for number in range(2) if not live.generation else ():
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.connect("web.sock")
        live.keep(f"client:{number}", client)
        say("first", await ask(client, b"a\\n"))
        if number == 0:
            server.close()
            server = await live.aio.start_server("web", on_client, path="web.sock")
    if not late:
        server.close()
    for name in live.names("client"):
        say("again", await ask(live.get(name), b"b\\n"))
    await live.aio.update()

asyncio.run(main())
"""


@pytest.mark.parametrize("late", [[], ["late"]])
def test_connections_of_a_closed_server_go_over_or_are_closed(
    tmp_path: Path, late: list[str]
) -> None:
    """They are also where the server is started after `ready`, which serves new ones then."""
    result = run(tmp_path, CLOSED, *late)
    assert result.of("first") == [["0 a\n"]] * 2, result.stderr
    assert result.of("again") == [["0 b\n"]] * 2 + [["1 b\n"]] * 2
    names = ["client:0", "client:1", *["web" for _ in late]]
    assert result.of("without") == [["", names]], result.stderr
    assert result.of("late") == [["2 c\n"]] * len(late), result.stderr


STREAMING = """
import asyncio

async def on_client(reader, writer):
    writer.transport.set_write_buffer_limits(1024)
    while True:
        writer.write(bytes(256 << 10))
        await writer.drain()

async def main():
    from cpr.live import streams
    streams.MOST_PENDING = 1 << 20
    server = await live.aio.start_server("feed", on_client, path="feed.sock")
    live.ready()
    reader, writer = await asyncio.open_unix_connection("feed.sock", limit=1024)
    try:
        await live.aio.update(["/bin/false"], timeout=0.3, mode="late")
    except live.UpdateError as error:
        (connection,) = server._connections.values()
        say("streams", error.reason, connection.transport.get_write_buffer_size())

asyncio.run(main())
"""


def test_a_handler_that_streams_does_not_fill_the_memory(tmp_path: Path) -> None:
    ((reason, size),) = run(tmp_path, STREAMING).of("streams")
    assert "'feed:1' is in the middle" in reason and "has set writer.saved" in reason
    assert size < 2 << 20


STALE = """
import asyncio, errno, socket

async def main():
    for number in range(2):
        server = await live.aio.start_server("web", print, path="web.sock")
        if number == 0:
            server.close()
    for path in ("web.sock", __file__, "no/folder"):
        try:
            await live.aio.start_server("other", print, path=path)
        except OSError as error:
            say(errno.errorcode[error.errno], error.filename)

asyncio.run(main())
"""


def test_a_socket_file_that_was_left_over_is_replaced(tmp_path: Path) -> None:
    result = run(tmp_path, STALE)
    program = str(tmp_path / "program.py")
    assert result.lines == [
        ["EADDRINUSE", "web.sock"],
        ["EADDRINUSE", program],
        ["ENOENT", "no/folder"],
    ], result.stderr
