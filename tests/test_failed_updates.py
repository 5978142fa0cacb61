"""Updates to programs that fail, early and late: the guest goes on, and nothing is left over."""

from __future__ import annotations

import pytest
from failing import Failing, programs, protocol_programs, start_vm

NAMES = [
    "false",
    "killed",
    "hang",
    "missing",
    "interpreter",
    "no-exec",
    "import",
    "bad-option",
    "ram-size",
    "fewer-cpus",
]


@pytest.mark.parametrize("late", [False, True], ids=["cpr-exec", "migrate"])
@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_fails(start, accel, tmp_path, name, late):
    command, text, same_pid = programs(tmp_path, accel)[name]
    failing = Failing(start_vm(start, accel))
    failing.update(command, late, tmp_path / "state")
    failing.check(text, same_pid)
    failing.update_well()


@pytest.mark.parametrize("kind", list(protocol_programs()))
def test_a_program_that_breaks_the_protocol(start, accel, tmp_path, kind):
    command, text, same_pid = protocol_programs()[kind]
    failing = Failing(start_vm(start, accel))
    failing.update(command, False, tmp_path / "state")
    failing.check(text, same_pid)
    failing.update_well()
