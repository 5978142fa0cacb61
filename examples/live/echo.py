"""An echo server that updates itself: `kill -HUP PID` after this file, or Python, has changed.

usage: python echo.py [PORT]
"""

import asyncio
import os
import signal
import sys

from cpr import live

total = live.state(default=0)


async def on_client(reader, writer):
    global total
    while data := await reader.read(65536):
        total += len(data)
        writer.write(data)
        await writer.drain()


def report(error):
    print(f"failed {os.getpid()} {error}", flush=True)


async def main():
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 7000
    server = await live.aio.start_server("echo", on_client, "127.0.0.1", port)
    live.on_save(lambda: total)
    timeout = float(os.environ.get("ECHO_TIMEOUT", "30"))
    live.update_on(signal.SIGHUP, timeout=timeout, on_error=report)
    live.ready()
    print(
        f"serving {os.getpid()} {live.generation} {server.sockets[0].getsockname()[1]}", flush=True
    )
    await server.serve_forever()


asyncio.run(main())
