"""cpr.mainloop: descriptors, timers in order, calls from other threads."""

from __future__ import annotations

import errno
import os
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from descriptors import open_fds

from cpr.mainloop import FEW_TIMERS, READ, MainLoop


def test_watch_and_unwatch():
    loop = MainLoop()
    reader, writer = os.pipe()
    seen: list[bytes] = []
    loop.watch(reader, READ, lambda events: seen.append(os.read(reader, 10)))
    os.write(writer, b"one")
    loop.iterate(1_000_000_000)
    loop.unwatch(reader)
    loop.unwatch(reader)
    os.write(writer, b"two")
    loop.iterate(0)
    assert seen == [b"one"]
    os.close(reader)
    os.close(writer)
    loop.close()


def test_a_callback_has_rounds_of_its_own():
    """What it has seen to is not called again by what the outer round saw, and no call is lost."""
    loop = MainLoop()
    pipes = [os.pipe() for _ in range(2)]
    seen: list[str] = []

    def take(fd: int) -> None:
        seen.append(os.read(fd, 10).decode())
        if len(seen) == 1:
            loop.call_soon(lambda: seen.append("inner call"))
            loop.iterate(0)
            loop.iterate(0)

    for reader, writer in pipes:
        os.set_blocking(reader, False)
        loop.watch(reader, READ, partial(lambda fd, events: take(fd), reader))
        os.write(writer, b"data")
    loop.call_soon(lambda: seen.append("outer call"))
    loop.call_soon(lambda: seen.append("outer call"))
    loop.iterate(0)
    loop.iterate(0)
    assert sorted(seen) == ["data", "data", "inner call", "outer call", "outer call"]
    assert seen.index("inner call") > seen.index("outer call")
    for fd in sum(pipes, ()):
        os.close(fd)
    loop.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_what_epoll_has_no_room_for_is_watched_later(monkeypatch, number):
    loop = MainLoop()
    reader, writer = os.pipe()
    monkeypatch.setattr("cpr.mainloop.RETRY_NS", 1_000_000)
    epoll, failures = loop._epoll, [number] * 3

    def register(fd: int, events: int) -> None:
        if failures:
            raise OSError(failures.pop(), "no room")
        epoll.register(fd, events)

    full = SimpleNamespace(register=register, unregister=epoll.unregister, poll=epoll.poll)
    full.modify, full.close = epoll.modify, epoll.close
    monkeypatch.setattr(loop, "_epoll", full)
    seen: list[str] = []
    loop.watch(reader, READ, lambda events: seen.append("old"))
    loop.watch(reader, READ, lambda events: seen.append(os.read(reader, 10).decode()))
    os.write(writer, b"here")
    while not seen:
        loop.iterate(None)
    assert seen == ["here"]
    loop.unwatch(reader)
    failures.append(errno.EPERM)
    with pytest.raises(PermissionError):
        loop.watch(reader, READ, print)
    failures.append(number)
    loop.watch(reader, READ, print)
    loop.unwatch(reader)
    loop.iterate(50_000_000)  # nobody watches it any more
    assert epoll.poll(0) == []
    os.close(reader)
    os.close(writer)
    loop.close()


def test_timers_run_in_the_order_of_their_deadlines():
    loop = MainLoop()
    order: list[str] = []
    loop.call_later(2_000_000, lambda: order.append("late"))
    loop.call_later(1_000_000, lambda: order.append("early"))
    loop.call_later(1_500_000, lambda: order.append("never")).cancel()
    while len(order) < 2:
        loop.iterate(None)
    assert order == ["early", "late"]
    loop.close()


def test_calls_from_another_thread_run_on_the_loop():
    loop = MainLoop()
    idents: list[int] = []

    def from_outside() -> None:
        loop.call_soon(lambda: idents.append(threading.get_ident()))
        loop.call_soon(loop.stop)

    thread = threading.Thread(target=from_outside)
    thread.start()
    loop.run()
    thread.join()
    assert idents == [threading.get_ident()]
    loop.close()


def test_all_its_descriptors_are_close_on_exec():
    before = set(open_fds())
    loop = MainLoop()
    for name in set(open_fds()) - before:
        try:
            assert not os.get_inheritable(int(name))
        except OSError:  # the descriptor of the listing itself
            continue
    loop.close()


def test_an_exception_is_reported_and_the_loop_goes_on(monkeypatch):
    reported: list[BaseException] = []
    monkeypatch.setattr("cpr.report.exception_report", reported.append)
    loop = MainLoop()
    loop.call_soon(lambda: [][1])
    loop.call_soon(loop.stop)
    loop.run()
    assert isinstance(reported[0], IndexError) and len(reported) == 1
    loop.close()


def test_a_deadline_in_a_thousand_years_is_waited_for():
    loop = MainLoop()
    loop.call_later(1000 * 365 * 86400 * 1_000_000_000, lambda: None)
    loop.call_at(1 << 70, lambda: None)
    loop.call_soon(loop.stop)
    loop.run()
    writer = threading.Timer(0.05, loop.stop)
    writer.start()
    loop.run()
    writer.join()
    loop.close()


def test_timers_that_are_armed_again_and_again_leave_nothing_behind():
    loop = MainLoop()
    kept = [loop.call_later(1 << 50, lambda: None) for _ in range(10)]
    for _ in range(10_000):
        loop.call_later(1 << 40, lambda: None).cancel()
    assert len(loop._timers) <= FEW_TIMERS
    assert sum(entry[2] in kept for entry in loop._timers) == len(kept)
    loop.close()


def test_a_timer_that_is_always_due_leaves_the_others_their_turn():
    loop = MainLoop()
    turns = []

    def again() -> None:
        turns.append("timer")
        loop.call_at(0, again)

    loop.call_at(0, again)
    loop.call_soon(lambda: turns.append("call"))
    for _ in range(3):
        loop.iterate(0)
    assert turns == ["call", "timer", "timer", "timer"]
    loop.close()
