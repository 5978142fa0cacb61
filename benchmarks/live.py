"""cpr.live beside what people use: requests lost, the longest stall, what is kept.

usage: python -m benchmarks.live [--updates N]; make bench-live, with a Python that tableflip takes

Each service answers HTTP with its PID and a count in its memory.  One client has a connection that
is kept alive, one makes a new one for each request.  The table goes to stdout.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from harness.vm import ROOT

SETTLE = 1.5  # s after each update
PAUSE = 0.002  # s between two requests of a client

HTTP = """
import asyncio, os, signal, socket, sys
count = 0
async def on_client(reader, writer):
    global count
    while await reader.readuntil(b"\\r\\n\\r\\n"):
        count += 1
        body = b"%d %d" % (os.getpid(), count)
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
        await writer.drain()
"""
LIVE = """
from cpr import live
count = live.state(default=0)
async def main():
    server = await live.aio.start_server("http", on_client, port=int(sys.argv[1]))
    live.on_save(lambda: count)
    live.update_on(signal.SIGHUP, timeout=10)
    live.ready()
    await server.serve_forever()
asyncio.run(main())
"""
LISTEN = """
async def main():
    server = await asyncio.start_server(on_client, sock=socket.socket(fileno=3))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 0)
    await server.serve_forever()
asyncio.run(main())
"""
TABLEFLIP = """
from tableflip import Options, Upgrader
async def upgrade(upgrader):
    try:
        await upgrader.upgrade()
    except Exception as error:
        print(error, file=sys.stderr)
async def main():
    upgrader = await Upgrader.new(Options(upgrade_timeout=10))
    tasks = []
    start = lambda: tasks.append(asyncio.create_task(upgrade(upgrader)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, start)
    sock = await upgrader.fds.listen("127.0.0.1", int(sys.argv[1]))
    server = await asyncio.start_server(on_client, sock=sock)
    await upgrader.ready()
    await upgrader.exit().wait()
    server.close()
    await server.wait_closed()
    await upgrader.wait_for_parent()
    upgrader.stop()
asyncio.run(main())
"""
WSGI = """
import os
count = 0
def app(environ, start):
    global count
    count += 1
    start("200 OK", [])
    return [b"%d %d" % (os.getppid(), count)]
"""


class Service:
    """A service in a folder; `update` gives it a new program, which is broken if asked for."""

    name = "cpr.live"
    package = ""  # that it needs
    file = "server.py"
    source = HTTP + LIVE

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.path = folder / self.file
        self.path.write_text(self.source)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start()

    def spawn(self, argv: list[str]) -> None:
        process = subprocess.Popen(
            argv,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)

    def start(self) -> None:
        self.spawn([sys.executable, self.file, str(self.port)])

    def update(self, pid: int) -> None:
        os.kill(pid, signal.SIGHUP)

    def close(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


class Listen(Service):
    """A socket unit's restart: the manager keeps the listening socket."""

    name = "restart with LISTEN_FDS"
    source = HTTP + LISTEN

    def start(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self._start()

    def _start(self) -> None:
        code = f"import os; os.dup2({self.sock.fileno()}, 3); " + (
            f"os.environ['LISTEN_PID'] = str(os.getpid()); os.execv({sys.executable!r}, "
            f"[{sys.executable!r}, {self.file!r}])"
        )
        os.set_inheritable(self.sock.fileno(), True)
        environment = {**os.environ, "LISTEN_FDS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=environment,
            close_fds=False,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)

    def update(self, pid: int) -> None:
        self.processes[-1].terminate()
        self.processes[-1].wait()
        self._start()

    def close(self) -> None:
        super().close()
        self.sock.close()


class Tableflip(Service):
    """Cloudflare's tableflip in Python: a second process gets the listening socket."""

    name = package = "tableflip"
    source = HTTP + TABLEFLIP


class Gunicorn(Service):
    """A second master by USR2, then QUIT to the first."""

    name = "gunicorn USR2"
    package = "gunicorn"
    file = "web.py"
    source = WSGI

    def start(self) -> None:
        bind = f"127.0.0.1:{self.port}"
        words = ["--bind", bind, "--threads", "4", "--keep-alive", "60", "--pid", "pid", "web:app"]
        self.spawn([sys.executable, "-m", "gunicorn", *words])

    def update(self, pid: int) -> None:
        os.kill(pid, signal.SIGUSR2)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                new = int((self.folder / "pid.2").read_text() or "0")
            except (OSError, ValueError):
                new = 0
            if new and new != pid:
                time.sleep(SETTLE)  # nothing says when its workers are up
                try:
                    os.kill(new, 0)
                except ProcessLookupError:
                    return
                os.kill(pid, signal.SIGQUIT)
                return
            time.sleep(0.01)


class Client(threading.Thread):
    """Requests, one after the other: how many were lost, and the longest one, in seconds."""

    def __init__(self, port: int, keep: bool) -> None:
        super().__init__(daemon=True)
        self.port, self.keep = port, keep
        self.done = self.lost = self.pid = self.count = 0
        self.longest = 0.0
        self.ended = self.forgotten = False

    def run(self) -> None:
        connection = None
        while not self.ended:
            began = time.monotonic()
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                connection.request("GET", "/")
                before = self.count
                self.pid, self.count = map(int, connection.getresponse().read().split())
                self.forgotten |= self.count < before
                self.done += 1
            except (OSError, ValueError, http.client.HTTPException):
                self.lost += 1
                if connection is not None:
                    connection.close()
                connection = None
            self.longest = max(self.longest, time.monotonic() - began)
            if not self.keep and connection is not None:
                connection.close()
                connection = None
            time.sleep(PAUSE)


def wait(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def measure(kind: type[Service], updates: int) -> list[str]:
    """The row of one service."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        service = kind(Path(folder), port)
        clients = [Client(port, keep) for keep in (True, False)]
        try:
            wait(lambda: _answers(port))
            for client in clients:
                client.start()
            time.sleep(SETTLE)
            for client in clients:
                client.lost, client.longest = 0, 0.0
            pid = clients[1].pid
            for _ in range(updates):
                service.update(clients[1].pid)
                time.sleep(SETTLE)
            kept_pid = wait(lambda: clients[1].pid == pid, SETTLE)  # the guard serves meanwhile
            kept_count = not clients[1].forgotten
            lost = [client.lost for client in clients]
            longest = max(client.longest for client in clients)
            service.path.write_text("no_such_name\n")
            service.update(clients[1].pid)
            time.sleep(SETTLE)
            before = clients[1].done
            alive = wait(lambda: clients[1].done > before, 3)
        finally:
            for client in clients:
                client.ended = True
            service.close()
    words = ["no", "yes"]
    after = "the old one serves on" if alive else "nothing serves"
    kept = [words[kept_pid], words[kept_count]]
    return [kind.name, *map(str, lost), f"{longest * 1000:.0f} ms", *kept, after]


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=5, help="of each service (5)")
    updates = parser.parse_args().updates
    print("| service | lost, kept alive | lost, new connections | longest request |", end="")
    print(" PID kept | memory kept | new program crashes |")
    print("|---|---|---|---|---|---|---|")
    for kind in (Service, Listen, Tableflip, Gunicorn):
        if not kind.package or importlib.util.find_spec(kind.package) is not None:
            print("|", " | ".join(measure(kind, updates)), "|", flush=True)


if __name__ == "__main__":
    main()
