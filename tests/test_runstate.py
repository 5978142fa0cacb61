"""cpr.runstate: the literal table of transitions."""

from __future__ import annotations

import pytest

from cpr import runstate


def test_a_state_is_set_again_without_effect():
    state = runstate.RunState(runstate.PRELAUNCH)
    for new in (runstate.RUNNING, runstate.RUNNING, runstate.FINISH_MIGRATE):
        state.set(new)
    assert state.current == runstate.FINISH_MIGRATE


def test_an_impossible_transition_raises_and_changes_nothing():
    state = runstate.RunState(runstate.RUNNING)
    with pytest.raises(ValueError, match="'running' -> 'inmigrate'"):
        state.set(runstate.INMIGRATE)
    assert state.current == runstate.RUNNING


def test_every_target_is_a_state():
    for targets in runstate.TRANSITIONS.values():
        assert targets <= set(runstate.TRANSITIONS) | {runstate.RESTORE_VM}


@pytest.mark.parametrize("state", [runstate.POSTMIGRATE, runstate.IO_ERROR, runstate.PAUSED])
def test_a_guest_that_slept_can_go_on_sleeping(state):
    assert runstate.SUSPENDED in runstate.TRANSITIONS[state]
