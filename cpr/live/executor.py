"""The threads of asyncio's default executor end for an exec, and nobody is refused meanwhile.

What was submitted before is done.  What is submitted meanwhile, by whoever has the executor, is
held, so that a service that always has a job comes to an exec too, and `release` submits it again.
A job may wait for one that is held: those are let through after a while, and it is tried again,
for longer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from cpr.live import session
from cpr.live.errors import UpdateError

STEP = 0.001  # s, how often it is looked whether the threads have ended
HOLD = 0.1  # s, how long jobs are held at first,
MOST_HOLD = 1.0  # and at most

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
            hold = min(2 * hold, MOST_HOLD)
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
    """Whether they have ended within `hold` seconds; else nothing has changed.

    Only when all of them have no job is the executor shut down: what `shutdown` leaves in the queue
    for its threads would end some of them later, and jobs would stay.
    """
    until = time.monotonic() + hold
    own = vars(executor).get("submit")
    with executor._shutdown_lock:  # who submits has it
        executor.submit = _submit_later(executor)
        rest = _Rest(executor)
    try:
        while not rest.all_have_come():
            current.check_new()
            if not current.remaining():
                raise UpdateError("the loop's default executor is busy")
            if time.monotonic() > until:
                return False
            await asyncio.sleep(STEP)
        executor.shutdown(wait=False)
        rest.end()
        for thread in rest.threads:  # they have nothing to do: nobody is kept waiting
            thread.join()
        _reopen(executor)
        return True
    finally:
        rest.end()
        if own is not None:
            executor.submit = own
        else:
            del executor.submit


class _Rest:
    """Has each thread of an executor wait, when it has done all that was submitted, until `end`."""

    def __init__(self, executor: Any) -> None:
        """Nobody submits anything meanwhile."""
        self._executor = executor
        self._over = threading.Event()
        self._come: set[threading.Thread] = set()
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()  # as a job has it
        self.threads = [thread for thread in executor._threads if thread.is_alive()]
        for _ in self.threads:  # not by `submit`, which may start another thread
            executor._work_queue.put(self)

    def run(self, *context: Any) -> None:
        """Called by a thread of the executor, as for a job; from Python 3.14 on with a context."""
        self._come.add(threading.current_thread())
        self._over.wait()
        self._executor._idle_semaphore.acquire(timeout=0)  # or it would count as two that are idle

    def all_have_come(self) -> bool:
        return all(each in self._come or not each.is_alive() for each in self.threads)

    def end(self) -> None:
        """Those that have come go on, and the others need not come.  May be called again."""
        self._over.set()
        jobs, waiting = [], self._executor._work_queue
        with contextlib.suppress(queue.Empty):
            while True:
                jobs.append(waiting.get_nowait())
        for job in jobs:
            if job is not self:
                waiting.put(job)


def _submit_later(executor: Any) -> Callable[..., Any]:
    """What stands for the executor's `submit`."""

    def submit_later(function: Callable[..., Any], /, *words: Any, **options: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        _held.append((executor, future, lambda: function(*words, **options)))
        return future

    return submit_later


def _reopen(executor: Any) -> None:
    """The inverse of an executor's `shutdown`: the program may have set it, and use it itself."""
    fresh = concurrent.futures.ThreadPoolExecutor()
    with executor._shutdown_lock:
        executor._threads = set()
        executor._idle_semaphore = fresh._idle_semaphore
        executor._work_queue = fresh._work_queue
        executor._shutdown = False
