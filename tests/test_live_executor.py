"""asyncio's default executor: its threads end for an exec, and no job is lost or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_programs import run

EXECUTOR = """
import asyncio, concurrent.futures, threading
name = lambda: threading.current_thread().name
ended = threading.Event()

async def main():
    loop = asyncio.get_running_loop()
    mine = concurrent.futures.ThreadPoolExecutor(2, "mine")
    loop.set_default_executor(mine)
    live.ready()
    for argv, words, busy in (
        (["/nonexistent"], {}, False),
        (["/bin/false"], {"mode": "late"}, False),
        (["/bin/false"], {"timeout": 0.3}, True),
        (["/bin/false"], {}, False),
    ):
        await asyncio.gather(*(asyncio.to_thread(name) for _ in range(3)))
        future = mine.submit(ended.wait) if busy else None
        try:
            await live.aio.update(argv, **words)
        except live.UpdateError as error:
            say("refused", error.reason)
        say("thread", (await asyncio.to_thread(name))[:4], mine.submit(name).result()[:4])
        if busy:
            ended.set()
            future.result()

asyncio.run(main())
"""


def test_an_executor_that_was_set_is_the_loops_after_a_failure(tmp_path: Path) -> None:
    result = run(tmp_path, EXECUTOR)
    assert result.of("thread") == [["mine", "mine"]] * 4, result.stderr
    reasons = [line[0] for line in result.of("refused")]
    assert "No such file" in reasons[0] and "status 1" in reasons[1] and "status 1" in reasons[3]
    assert reasons[2] == "the loop's default executor is busy"


STEADY = """
import asyncio, concurrent.futures
submitted = done = 0
busy = True

async def main():
    global busy
    loop = asyncio.get_running_loop()
    mine = concurrent.futures.ThreadPoolExecutor(3, "mine")
    loop.set_default_executor(mine)
    live.ready()
    if live.generation:
        say("new", await asyncio.to_thread(int))
        return
    async def work(by_name):
        global submitted, done
        while busy:
            submitted += 1
            if by_name:
                await asyncio.wrap_future(mine.submit(time.sleep, 0.03))
            else:
                await asyncio.to_thread(time.sleep, 0.02)
            done += 1
    tasks = [asyncio.create_task(work(number % 2)) for number in range(4)]
    await asyncio.sleep(0.1)
    for mode in ("early", "late"):
        try:
            await live.aio.update(["/bin/false"], mode=mode)
        except live.UpdateError as error:
            say("failed", error.reason)
        before = done
        while done < before + 10:
            await asyncio.sleep(0.01)
    busy = False
    await asyncio.gather(*tasks)
    say("done", submitted - done)
    busy = True
    tasks = [asyncio.create_task(work(number % 2)) for number in range(4)]
    await live.aio.update(mode=sys.argv[1])

asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_an_executor_that_always_has_a_job_is_in_no_updates_way(tmp_path: Path, mode: str) -> None:
    result = run(tmp_path, STEADY, mode)
    reason = "the new program has ended with exit status 1 before it took over"
    assert result.of("failed") == [[reason]] * 2, result.stderr
    assert result.of("done") == [[0]] and result.of("new") == [[0]], result.stderr


NESTED = """
import asyncio

async def main():
    loop = asyncio.get_running_loop()
    live.ready()
    async def inner():
        return await asyncio.to_thread(int, "7")
    def outer():
        time.sleep(0.2)
        return asyncio.run_coroutine_threadsafe(inner(), loop).result()
    job = asyncio.create_task(asyncio.to_thread(outer))
    await asyncio.sleep(0.05)
    try:
        await live.aio.update(["/bin/false"], timeout=20)
    except live.UpdateError as error:
        say("failed", error.status, await job)

asyncio.run(main())
"""


def test_a_job_that_waits_for_another_comes_to_its_end(tmp_path: Path) -> None:
    result = run(tmp_path, NESTED)
    assert result.of("failed") == [[1, 7]], result.stderr


RESTING = """
import asyncio

async def on_client(reader, writer):
    while line := await reader.readline():
        began.set()
        await asyncio.sleep(0.1)
        writer.write(await asyncio.to_thread(line.upper))

async def main():
    global began
    began = asyncio.Event()
    await live.aio.start_server("upper", on_client, path="upper.sock")
    live.ready()
    reader, writer = await asyncio.open_unix_connection("upper.sock")
    writer.write(b"one\\n")
    await began.wait()
    try:
        await live.aio.update(["/bin/false"], mode="late")
    except live.UpdateError as error:
        say("failed", error.status, (await reader.readline()).decode())
    say("thread", await asyncio.wait_for(asyncio.to_thread(int), 5))

asyncio.run(main())
"""


def test_what_a_handler_starts_before_it_is_at_rest_ends_too(tmp_path: Path) -> None:
    result = run(tmp_path, RESTING)
    assert result.of("failed") == [[1, "ONE\n"]], result.stderr
    assert result.of("thread") == [[0]]


TWICE = """
import asyncio, concurrent.futures

async def fail_twice(**options):
    for _ in range(2):
        try:
            await live.aio.update(["/bin/false"], **options)
        except live.UpdateError as error:
            say("failed", error.status)
"""

FEW = (
    TWICE
    + """
answered = []

async def main():
    loop = asyncio.get_running_loop()
    threads = int(sys.argv[1])
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(threads))
    live.ready()
    if live.generation:
        say("new", await asyncio.to_thread(int))
        return
    async def job(number):
        await asyncio.sleep(0.05 * number)
        await asyncio.to_thread(time.sleep, 0.25 * threads)
        answered.append(number)
    jobs = [asyncio.create_task(job(number)) for number in range(4 * threads)]
    await asyncio.sleep(0.01)
    await fail_twice()
    await asyncio.gather(*jobs)
    say("answered", sorted(answered) == list(range(4 * threads)))
    await live.aio.update()

asyncio.run(main())
"""
)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_jobs_that_take_longer_than_they_are_held_are_all_done(tmp_path: Path, threads) -> None:
    result = run(tmp_path, FEW, threads)
    assert result.of("failed") == [[1], [1]], result.stderr
    assert result.of("answered") == [[True]]
    assert result.of("new") == [[0]]


TWO = (
    TWICE
    + """

async def main():
    loop = asyncio.get_running_loop()
    mine = concurrent.futures.ThreadPoolExecutor(2)
    loop.set_default_executor(mine)
    live.ready()
    def outer():
        time.sleep(0.15)
        return mine.submit(int, "7").result()
    jobs = [asyncio.to_thread(outer), asyncio.to_thread(time.sleep, 0.35)]
    jobs = [asyncio.create_task(job) for job in jobs]
    await asyncio.sleep(0.01)
    await fail_twice(timeout=20)
    say("done", *await asyncio.gather(*jobs))

asyncio.run(main())
"""
)


def test_a_job_that_waits_for_another_beside_one_that_is_busy(tmp_path: Path) -> None:
    result = run(tmp_path, TWO)
    assert result.of("failed") == [[1], [1]], result.stderr
    assert result.of("done") == [[7, None]]


ENDED = """
import asyncio, concurrent.futures

async def main():
    loop = asyncio.get_running_loop()
    mine = concurrent.futures.ThreadPoolExecutor(2)
    loop.set_default_executor(mine)
    live.ready()
    if live.generation:
        say("new", await asyncio.to_thread(int))
        return
    job = asyncio.create_task(asyncio.to_thread(time.sleep, 0.3))
    await asyncio.sleep(0.01)
    for timeout in (0.3, 0.302, 0.305, 0.31):  # which ends when the job does
        try:
            await live.aio.update(["/bin/false"], timeout=timeout)
        except live.UpdateError:
            say("failed")
        await job
        job = asyncio.create_task(asyncio.to_thread(time.sleep, 0.3))
        await asyncio.sleep(0.01)
    for delay in range(40):  # it is given up at any moment
        update = asyncio.create_task(live.aio.update(["/bin/false"]))
        await asyncio.sleep(delay / 100)
        update.cancel()
        try:
            await update
        except (live.UpdateError, asyncio.CancelledError):
            pass
        say("thread", await asyncio.wait_for(asyncio.to_thread(int), 5))
    await job
    mine.shutdown()
    await live.aio.update()

asyncio.run(main())
"""


def test_an_executor_is_in_use_again_whenever_an_update_ends(tmp_path: Path) -> None:
    """And one that the program has shut down is in no update's way."""
    result = run(tmp_path, ENDED)
    assert result.of("failed") == [[]] * 4, result.stderr
    assert result.of("thread") == [[0]] * 40, result.stderr
    assert result.of("new") == [[0]], result.stderr
