"""The fake of the exec, as a user's unit tests use it."""

from __future__ import annotations

import os
import socket

import pytest

from cpr import live
from cpr.live import testing


def test_names_state_and_memory_are_there_after_a_restart() -> None:
    with testing.fake() as process:
        assert live.generation == 0 and live.predecessor is None
        assert live.state(default="none") == "none"
        first, second = socket.socketpair()
        live.keep("pair", first)
        live.memory("table", 4096)[:2] = b"hi"
        live.on_save(lambda: {"requests": 3})
        live.ready()
        assert process.run(
            live.update, ["server", "--new"], env={"A": "b"}, mode="late", allow="thread"
        )
        assert (process.argv, process.env, process.mode) == (
            ["server", "--new"],
            {"A": "b"},
            "late",
        )
        process.restart()
        assert live.generation == 1
        assert live.predecessor is not None and live.predecessor.pid == os.getpid()
        assert live.state() == {"requests": 3}
        assert live.names() == ["pair", "table"]
        assert live.memory("table", 4096)[:2] == b"hi"
        again = live.get("pair")
        assert again is not first
        second.send(b"x")
        assert again.recv(1) == b"x"
        assert not process.committed
        live.ready()
        assert process.committed
        for each in (first, second, again):
            each.close()


def test_a_failing_update_raises_and_leaves_everything() -> None:
    with testing.fake() as process:
        calls: list[str] = []
        live.on_pause(lambda: calls.append("pause"))
        live.on_resume(lambda: calls.append("resume"))
        live.on_save(lambda: calls.append("save"))
        process.fail("it has crashed", signal=11)
        with pytest.raises(live.UpdateError) as caught:
            live.update(allow=["thread"])
        assert (caught.value.reason, caught.value.signal) == ("it has crashed", 11)
        assert calls == ["pause", "save", "resume"]
        assert process.updates == 0
        with pytest.raises(RuntimeError):
            process.restart()


def test_a_rehearsal_starts_nothing_and_leaves_everything() -> None:
    with testing.fake() as process:
        saves: list[int] = []
        live.on_save(lambda: saves.append(1))
        assert live.rehearse(["/nonexistent"]) == (True, "", None, None, [])
        assert process.argv == [] and process.updates == 0
        process.fail("it has ended", status=3)
        verdict = live.rehearse()
        assert not verdict and verdict == (False, "it has ended", 3, None, [])
        live.on_save(lambda: {1, 2})
        assert "JSON cannot carry" in live.rehearse().reason
        live.on_save(lambda: "state")
        assert process.run(live.update, allow=["thread"])
    assert len(saves) == 2


def test_a_newer_state_is_refused_by_name() -> None:
    with testing.fake() as process:

        @live.on_save(version=3)
        def save_all() -> bytes:
            return b"\0data"

        assert process.run(live.update, allow=["thread"])
        process.restart()
        with pytest.raises(live.UpdateError, match=r"save_all.* version 3.* version 2"):
            live.state(version=2)
        assert live.state(version=3) == b"\0data"


def test_a_hook_that_fails_hides_neither_the_error_nor_the_others() -> None:
    with testing.fake() as process:
        calls: list[str] = []
        live.on_resume(lambda: 1 / 0)
        live.on_resume(lambda: calls.append("second"))
        process.fail("it has crashed", status=1)
        with pytest.raises(live.UpdateError, match=r"it has crashed; .*on_resume.*ZeroDivision"):
            live.update(allow=["thread"])
        assert calls == ["second"]
        assert process.run(live.update, allow=["thread"])
