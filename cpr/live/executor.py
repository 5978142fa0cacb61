"""The threads of asyncio's default executor end for an exec, and nobody is refused meanwhile.

What was submitted before is done.  What is submitted meanwhile, by whoever has the executor, is
held, so that a service that always has a job comes to an exec too, and `release` submits it again.
A job may wait for one that is held: those are let through after a while, and it is tried again,
for longer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

from cpr.live import session
from cpr.live.errors import UpdateError

STEP = 0.001  # s, how often it is looked whether the threads have ended
HOLD = 0.1  # s, how long jobs are held at first

Job = tuple[Any, "concurrent.futures.Future[Any]", Callable[[], Any]]
_held: list[Job] = []


async def end(loop: Any, current: session.Session) -> None:
    """Ends the threads of the loop's default executor; jobs that come meanwhile wait for `release`.

    When this returns it can be used again, and starts new threads.  Raises UpdateError where it is
    busy for all the time that is left.
    """
    ended, hold = None, HOLD
    while (executor := getattr(loop, "_default_executor", None)) is not ended:
        if await _end_threads(executor, hold, current):
            ended = executor
        else:
            hold *= 2
            release()


def release() -> None:
    """Submits the jobs that were held."""
    held, _held[:] = _held[:], []
    for executor, future, call in held:
        try:
            executor.submit(_run, future, call)
        except RuntimeError as error:  # the program has shut it down
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _run(future: concurrent.futures.Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


async def _end_threads(executor: Any, hold: float, current: session.Session) -> bool:
    """Whether they have ended within `hold` seconds."""
    until = time.monotonic() + hold
    own = vars(executor).get("submit")
    executor.submit = _submit_later(executor, executor.submit)
    try:
        executor.shutdown(wait=False)
        while any(thread.is_alive() for thread in executor._threads):
            current.check_new()
            if not current.remaining():
                raise UpdateError("the loop's default executor is busy")
            if time.monotonic() > until:
                return False
            await asyncio.sleep(STEP)
        return True
    finally:
        with executor._shutdown_lock:
            _reopen(executor)
        if own is not None:
            executor.submit = own
        else:
            del executor.submit


def _submit_later(executor: Any, submit: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for the executor's `submit`."""

    def submit_later(function: Callable[..., Any], /, *words: Any, **options: Any) -> Any:
        with executor._shutdown_lock:
            if executor._shutdown:
                future: concurrent.futures.Future[Any] = concurrent.futures.Future()
                _held.append((executor, future, lambda: function(*words, **options)))
                return future
        return submit(function, *words, **options)

    return submit_later


def _reopen(executor: Any) -> None:
    """The inverse of an executor's `shutdown`: the program may have set it, and use it itself."""
    fresh = concurrent.futures.ThreadPoolExecutor()
    executor._threads = {thread for thread in executor._threads if thread.is_alive()}
    executor._idle_semaphore = fresh._idle_semaphore
    if not executor._threads:  # else they wait for the queue that they have
        executor._work_queue = fresh._work_queue
    executor._shutdown = False
