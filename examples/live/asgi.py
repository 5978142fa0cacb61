"""An ASGI application under uvicorn that updates itself: `kill -HUP PID`.

uvicorn takes the preserved listening socket.  Before the hand-over it finishes what it serves;
who connects meanwhile waits in the listening socket.

usage: python asgi.py [PORT]
"""

import asyncio
import os
import signal
import socket
import sys

import uvicorn

from cpr import live

PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
IDLE_STEPS = 100  # of 10 ms: for so long a connection that is kept alive may be idle
served = 0


async def app(scope, receive, send):
    global served
    served += 1
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % served})


class Web:
    """uvicorn, which is started again where an update fails after it was stopped."""

    def __init__(self, listener):
        self.listener = listener

    def start(self):
        config = uvicorn.Config(app, lifespan="off", log_level="warning")
        self.server = uvicorn.Server(config)
        self.sock = self.listener.dup()  # uvicorn closes what it gets
        self.task = asyncio.get_running_loop().create_task(self.server.serve(sockets=[self.sock]))

    async def stop(self):
        """uvicorn's own end would cut off who has connected and not asked yet: they come first."""
        while not self.server.started:
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().remove_reader(self.sock)  # nobody else is accepted
        for _ in range(IDLE_STEPS):
            await asyncio.sleep(0.01)
            if not self.server.server_state.connections:
                break
        self.server.should_exit = True
        await self.task


def report(error):
    print(f"failed {os.getpid()} {error}", flush=True)


async def main():
    global served
    listener = live.socket("http", lambda: socket.create_server(("127.0.0.1", PORT), backlog=1024))
    web = Web(listener)
    live.aio.on_stop(web.stop)
    live.aio.on_resume(web.start)
    live.on_save(lambda: served)
    live.update_on(signal.SIGHUP, on_error=report)
    served = live.state(default=0)
    live.ready()
    web.start()
    print(f"serving {os.getpid()} {live.generation} {listener.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
