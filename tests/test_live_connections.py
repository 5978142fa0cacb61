"""Connections of the asyncio server: what is under way, and what clients see of an update."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

CONNECTED = """
import socket

def connected(path):
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.setblocking(False)
    return client
"""

WHOLE = """
import asyncio, socket
half = b"x" * 200000  # more than a reader's limit

async def on_client(reader, writer, *, resumed=False):
    data = await reader.read()
    say("all", live.generation, resumed, len(data), data == half + half)
    writer.close()
    if live.generation == 2:
        done.set_result(None)

async def main():
    global done
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    server = await live.aio.start_server("whole", on_client, path="whole.sock")
    client = live.socket("client", lambda: connected("whole.sock"))
    live.ready()
    if live.generation < 2:
        if live.generation == 0:
            while not server._connections:
                await asyncio.sleep(0.001)
            (connection,) = server._connections.values()
            feed, left = connection.reader.feed_data, len(half)
            def count(data):
                nonlocal left
                left -= len(data)
                feed(data)
            connection.reader.feed_data = count
            await loop.sock_sendall(client, half)
            while left:
                await asyncio.sleep(0.001)
        await live.aio.update()
    await loop.sock_sendall(client, half)
    client.shutdown(socket.SHUT_WR)
    await done

asyncio.run(main())
"""


def test_what_a_handler_waits_for_as_a_whole_goes_over(tmp_path: Path) -> None:
    result = run(tmp_path, CONNECTED + WHOLE)
    assert result.of("all") == [[2, True, 400000, True]], result.stderr


CLOSING = """
import asyncio, socket
SIZE = 8 << 20

async def on_client(reader, writer):
    writer.write(b"x" * SIZE)
    writer.close()
    waits.set()
    await writer.wait_closed()

async def main():
    global waits
    loop, waits = asyncio.get_running_loop(), asyncio.Event()
    await live.aio.start_server("closing", on_client, path="closing.sock")
    client = live.socket("client", lambda: connected("closing.sock"))
    live.ready()
    if live.generation == 0:
        await waits.wait()
        say("failed", fails(["/bin/false"], mode="late").status)
        await live.aio.update(timeout=10)
    size = 0
    while data := await loop.sock_recv(client, 1 << 20):
        size += len(data)
    say("end", live.generation, size == SIZE)

asyncio.run(main())
"""


def test_a_client_that_reads_nothing_holds_up_no_update(tmp_path: Path) -> None:
    """Its handler has closed the connection, and waits for that."""
    result = run(tmp_path, CONNECTED + CLOSING)
    assert result.of("end") == [[1, True]], result.stderr
    assert result.of("failed") == [[1]]


ENDED = """
import asyncio
SIZE = 8 << 20
if len(sys.argv) > 1:
    live.generation  # it has copies of the connections now
    open("there", "w").close()
    while not os.path.exists("seen"):
        time.sleep(0.01)
    raise SystemExit(3)

async def on_client(reader, writer):
    writer.write(bytes(int(await reader.readline())))

async def main():
    await live.aio.start_server("ended", on_client, path="ended.sock")
    live.ready()
    clients = [await asyncio.open_unix_connection("ended.sock") for _ in range(2)]
    update = asyncio.create_task(live.aio.update([PYTHON, __file__, "new"]))
    while not os.path.exists("there"):
        await asyncio.sleep(0.01)
    for (reader, writer), size in zip(clients, (0, SIZE)):
        writer.write(b"%d\\n" % size)
        try:
            say("end", len(await asyncio.wait_for(reader.read(), 5)) == size)
        except TimeoutError:
            say("no end", size)
    open("seen", "w").close()
    try:
        await update
    except live.UpdateError as error:
        say("failed", error.status)

asyncio.run(main())
"""


def test_a_client_sees_the_end_while_a_new_program_starts(tmp_path: Path) -> None:
    result = run(tmp_path, ENDED)
    assert result.of("end") == [[True]] * 2, result.stderr
    assert result.of("failed") == [[3]]


TASKS = """
import asyncio
tasks = set()

async def answer(line, writer):
    await asyncio.sleep(0.2)
    writer.write(b"%d %s" % (live.generation, line))

async def on_client(reader, writer):
    while line := await reader.readline():
        task = asyncio.create_task(answer(line, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

async def stop():
    while tasks:
        await asyncio.wait(tasks)
    await asyncio.get_running_loop().sock_sendall(client, b"two\\n")  # a client at this moment
    await asyncio.sleep(0.05)

async def main():
    global client
    live.aio.on_stop(stop)
    await live.aio.start_server("tasks", on_client, path="tasks.sock")
    client = live.socket("client", lambda: connected("tasks.sock"))
    live.ready()
    if live.generation == 0:
        client.send(b"one\\n")
        while not tasks:
            await asyncio.sleep(0.001)
        await live.aio.update(mode=sys.argv[1])
    reader, writer = await asyncio.open_connection(sock=client.dup())
    for _ in range(2):
        say("answer", (await asyncio.wait_for(reader.readline(), 10)).decode())

asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_what_tasks_of_a_handler_answer_is_waited_for_in_on_stop(tmp_path: Path, mode: str) -> None:
    """Nothing is read any more then, and no task is started that nobody would wait for."""
    result = run(tmp_path, CONNECTED + TASKS, mode)
    assert result.of("answer") == [["0 one\n"], ["1 two\n"]], result.stderr


GIVEN = ENDED.replace(
    "    writer.write(bytes(int(await reader.readline())))\n",
    """    size = int(await reader.readline())
    copy = os.dup(writer.get_extra_info("socket").fileno())
    writer.close()
    await writer.wait_closed()
    os.write(copy, bytes(min(size, 100)))  # as a child that has it would
    os.close(copy)
""",
).replace("size in zip(clients, (0, SIZE))", "size in zip(clients, (100,))")


def test_a_connection_that_a_handler_has_given_on_is_not_cut(tmp_path: Path) -> None:
    result = run(tmp_path, GIVEN.replace("reader.read(), 5", "reader.readexactly(100), 5"))
    assert result.of("end") == [[True]], result.stderr
    assert result.of("failed") == [[3]]
