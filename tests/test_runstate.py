"""cpr.runstate: the literal table of transitions."""

from __future__ import annotations

import pytest

from cpr import runstate


def test_a_change_calls_the_handlers_with_old_and_new():
    state = runstate.RunState(runstate.PRELAUNCH)
    changes: list[tuple[str, str]] = []

    def handler(old: str, new: str) -> None:
        changes.append((old, new))

    state.add_change_handler(handler)
    state.set(runstate.RUNNING)
    state.set(runstate.RUNNING)
    state.set(runstate.FINISH_MIGRATE)
    state.remove_change_handler(handler)
    state.set(runstate.POSTMIGRATE)
    assert changes == [("prelaunch", "running"), ("running", "finish-migrate")]


def test_an_impossible_transition_raises_and_changes_nothing():
    state = runstate.RunState(runstate.RUNNING)
    with pytest.raises(ValueError, match="'running' -> 'inmigrate'"):
        state.set(runstate.INMIGRATE)
    assert state.current == runstate.RUNNING


def test_every_target_is_a_state():
    for targets in runstate.TRANSITIONS.values():
        assert targets <= set(runstate.TRANSITIONS) | {runstate.RESTORE_VM}
