"""The examples under load: updates, every third of which fails, and nothing is lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_programs import ROOT, TIMEOUT, command, environment

EXAMPLES = ROOT / "examples" / "live"
UPDATES = int(os.environ.get("LIVE_UPDATES", "6"))
CONNECTIONS = 50
CLIENTS = 4  # of the HTTP server, each a thread
MOST = 40000  # bytes of one message
FAILURES = {
    "import": "import no_such_module\n",
    "crash": "import os; os.abort()\n",
    "hang": "import time; time.sleep(60)\n",
    "killed": "import os; os.kill(os.getpid(), 9)\n",
    "late": "from cpr import live; live.state(); live.names(); raise SystemExit(3)\n",
}
FAILING_TIMEOUT = "3"  # s; of the one that hangs


class Service:
    """An example under a process that reaps; what it prints are words."""

    def __init__(self, folder: Path, name: str, *arguments: str, **variables: str) -> None:
        self.path = folder / name
        shutil.copy(EXAMPLES / name, self.path)
        self.source = self.path.read_text()
        self.process = subprocess.Popen(
            command(self.path, *arguments),
            env=environment(**variables),
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = 0

    def line(self, *expected: str) -> list[str]:
        """The next line, which begins with one of these words; notes the PID in it."""
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words and words[0] in expected, words
        self.pid = int(words[1])
        return words

    def update(self, failure: str | None = None) -> list[str]:
        """One update by SIGHUP, to a program that fails if that is asked for."""
        self.path.write_text(FAILURES[failure] if failure else self.source)
        os.kill(self.pid, signal.SIGHUP)
        return self.line("failed" if failure else "serving")

    def close(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.communicate()


@pytest.fixture
def services() -> Iterator[list[Service]]:
    found: list[Service] = []
    yield found
    for each in found:
        each.close()


async def talk(port: int, seed: int, stop: asyncio.Event, counts: list[int]) -> None:
    """One connection: what it sends comes back, in pieces that need not fit into buffers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    source = random.Random(seed)
    while not stop.is_set():
        data = source.randbytes(source.randint(1, MOST))
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        counts[0] += len(data)
        await asyncio.sleep(source.random() * 0.05)
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()


async def connect(port: int, stop: asyncio.Event, counts: list[int]) -> None:
    """New connections, one after the other."""
    while not stop.is_set():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        counts[1] += 1
        await asyncio.sleep(0.02)


def test_echo_loses_nothing(tmp_path: Path, services: list[Service]) -> None:
    service = Service(tmp_path, "echo.py", "0", ECHO_TIMEOUT=FAILING_TIMEOUT)
    services.append(service)
    port = int(service.line("serving")[3])
    kinds = list(FAILURES)

    async def load() -> list[int]:
        stop, counts = asyncio.Event(), [0, 0]
        tasks = [asyncio.create_task(talk(port, seed, stop, counts)) for seed in range(CONNECTIONS)]
        tasks.append(asyncio.create_task(connect(port, stop, counts)))
        generation = 0
        for number in range(1, UPDATES + 1):
            failure = kinds[number // 3 % len(kinds)] if number % 3 == 0 else None
            pid, before = service.pid, counts[0]
            words = await asyncio.to_thread(service.update, failure)
            if failure is None:
                generation += 1
                assert words[1:3] == [str(pid), str(generation)]
            else:
                assert words[1] != str(pid)
            while counts[0] < before + 10 * MOST:  # everybody goes on
                assert not [task for task in tasks if task.done()]
                await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*tasks)
        return counts

    counts = asyncio.run(asyncio.wait_for(load(), 100 + 10 * UPDATES))
    assert counts[0] > 0 and counts[1] > 0


def request(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read()
    finally:
        connection.close()


def ask(port: int, seed: int, stop: threading.Event, counts: list[int]) -> None:
    """Sets and gets slots of its own, one request after the other; none is lost."""
    number = 0
    while not stop.is_set():
        number += 1
        path = f"/{seed * 1000 + number % 100}"
        line = b"%d of %d" % (number, seed)
        request(port, "PUT", path, line)
        assert request(port, "GET", path) == line
        counts[seed] += 1


def test_cache_loses_no_request(tmp_path: Path, services: list[Service]) -> None:
    service = Service(tmp_path, "cache.py", "0", str(1 << 30), CACHE_TIMEOUT=FAILING_TIMEOUT)
    services.append(service)
    port = int(service.line("serving")[3])
    request(port, "PUT", "/8388607", b"the last slot")
    stop, counts = threading.Event(), [0] * CLIENTS
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        tasks = [pool.submit(ask, port, seed, stop, counts) for seed in range(CLIENTS)]
        try:
            for failure in (None, "import", None, "killed"):
                pid = service.pid
                service.update(failure)
                assert (service.pid == pid) == (failure is None)
                before = list(counts)
                while not all(now > then for now, then in zip(counts, before, strict=True)):
                    assert not [task for task in tasks if task.done()]
                    stop.wait(0.01)
        finally:
            stop.set()
        for task in tasks:
            task.result()
    assert request(port, "GET", "/8388607") == b"the last slot"


def test_cache_waits_for_no_silent_client(tmp_path: Path, services: list[Service]) -> None:
    """Its thread is joined before the hand-over."""
    service = Service(tmp_path, "cache.py", "0", str(1 << 20))
    services.append(service)
    port = int(service.line("serving")[3])
    with socket.create_connection(("127.0.0.1", port)) as client:
        request(port, "PUT", "/1", b"accepted after it")
        client.settimeout(TIMEOUT)
        os.kill(service.pid, signal.SIGHUP)
        assert client.recv(1) == b""
        service.line("serving")
    assert request(port, "GET", "/1") == b"accepted after it"


def test_worker_goes_on_where_it_was(tmp_path: Path, services: list[Service]) -> None:
    service = Service(tmp_path, "worker.py", "60000000")
    services.append(service)
    assert int(service.line("serving")[3]) == 2
    places = [2]
    for failure in (None, "import", None):
        words = service.update(failure)
        if failure is None:
            places.append(int(words[3]))
    assert places == sorted(places) and places[1] > 2
    assert service.line("done")[2] == "3562115"


def count_up(port: int, stop: threading.Event, counts: list[int]) -> None:
    """Requests that are numbered: the next program goes on counting where the last one was."""
    while not stop.is_set():
        number = int(request(port, "GET", "/"))
        assert number == counts[0] + 1
        counts[0] = number


def test_asgi_loses_no_request_and_no_count(tmp_path: Path, services: list[Service]) -> None:
    pytest.importorskip("uvicorn")
    service = Service(tmp_path, "asgi.py", "0")
    services.append(service)
    port = int(service.line("serving")[3])
    stop, counts = threading.Event(), [0]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        task = pool.submit(count_up, port, stop, counts)
        try:
            for failure in (None, "crash", "late", None):
                before = counts[0]
                service.update(failure)
                while counts[0] < before + 10:
                    assert not task.done(), task.result()
                    stop.wait(0.01)
        finally:
            stop.set()
        task.result()
