"""A table of 1 GiB, served by a threaded HTTP server that updates itself: `kill -HUP PID`.

GET /N gives the line in slot N, PUT /N sets it.  The table is shared memory that the next program
has too; requests that are being served are finished before the hand-over, and connections that
come meanwhile wait in the listening socket.

usage: python cache.py [PORT [BYTES]]
"""

import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cpr import live

SLOT = 128  # bytes; the first is the length
SIZE = int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 30


class Handler(BaseHTTPRequestHandler):
    timeout = 2  # s; a client that says nothing holds up an update for so long

    def do_GET(self):
        at = self.place()
        self.answer(table[at + 1 : at + 1 + table[at]])

    def do_PUT(self):
        at, line = self.place(), self.rfile.read(int(self.headers["Content-Length"]))[: SLOT - 1]
        table[at : at + 1 + len(line)] = bytes([len(line)]) + line
        self.answer(b"")

    def place(self):
        return int(self.path[1:]) % (SIZE // SLOT) * SLOT

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() waits for those that serve

    def __init__(self, sock):
        super().__init__(sock.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock.dup()  # ours to close; the preserved one listens on


@live.on_pause
def pause():
    """Ends all threads, each with its request done."""
    server.shutdown()
    accepting.join()
    server.server_close()


@live.on_resume
def resume():
    global server, accepting
    server = Server(listener)
    accepting = threading.Thread(target=server.serve_forever, args=(0.01,), name="accept")
    accepting.start()


listener = live.socket(
    "http",
    lambda: socket.create_server(
        ("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), backlog=1024
    ),
)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # waited for below, by one thread
table = live.memory("table", SIZE)
live.ready()
resume()
print(f"serving {os.getpid()} {live.generation} {listener.getsockname()[1]}", flush=True)
while True:
    signal.sigwait([signal.SIGHUP])
    try:
        live.update(timeout=float(os.environ.get("CACHE_TIMEOUT", "30")))
    except live.UpdateError as error:
        print(f"failed {os.getpid()} {error}", flush=True)
