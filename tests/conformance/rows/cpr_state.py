"""Part 1: what the reader of the CPR state takes, and how it refuses the rest."""

from __future__ import annotations

import signal
from functools import partial

from ..cpr_state import Entry, encode, encode_entry
from ..incoming_steps import MARK, MARK_AT, take_over
from ..match import like
from ..row import Row, Steps
from ..steps import (
    DEFER,
    comes_to,
    connect,
    counting,
    exits,
    hmp,
    migration,
    qmp,
    status,
    survives,
)

CLOSED = 450
"""A number that no descriptor has."""

ABORTED = -signal.SIGABRT
LOST = like(r".*'kvm-tpr-opt'.*")
"""Where QEMU's own first device finds that the RAM is empty."""


def with_ram(name: str = "ram0", id: int = 0, fd: int | None = None) -> partial[bytes]:
    """Makes a state whose RAM entry is another."""
    return partial(_with_ram, name, id, fd)


def _with_ram(name: str, id: int, fd: int | None, entries: list[Entry]) -> bytes:
    return encode(
        [
            (name, id, each[2] if fd is None else fd) if each[0] == "ram0" else each
            for each in entries
        ]
    )


def _reversed(entries: list[Entry]) -> bytes:
    return encode(entries[::-1])


def _with_unknown(entries: list[Entry]) -> bytes:
    return encode([("unknown", 7, entries[0][2]), *entries])


def _twice(entries: list[Entry]) -> bytes:
    """RAM, and after it the same name and id with another descriptor."""
    other = next(fd for name, _, fd in entries if name != "ram0")
    return encode([*entries, ("ram0", 0, other)])


def _only_ram(entries: list[Entry]) -> bytes:
    return encode([each for each in entries if each[0] == "ram0"])


def _without_ram(entries: list[Entry]) -> bytes:
    return encode([each for each in entries if each[0] != "ram0"])


def _no_entries(entries: list[Entry]) -> bytes:
    return encode([])


def _ram_name_without_nul(entries: list[Entry]) -> bytes:
    ram = next(each for each in entries if each[0] == "ram0")
    state = encode([each for each in entries if each != ram])
    return state[:8] + encode_entry(*ram, terminator=b"") + state[8:]


def _cut(size: int, entries: list[Entry]) -> bytes:
    return encode(entries)[:size]


def _without_end_of_list(entries: list[Entry]) -> bytes:
    return encode(entries, subsection=False)[:-1]


def _with_tail(entries: list[Entry]) -> bytes:
    return encode(entries) + b"and something more"


def taken(id: str, source: str, *steps: Steps) -> Row:
    """A state that is taken: the guest goes on where it was."""
    return Row(id, source, *steps, connect(), survives())


def ends(id: str, source: str, *steps: Steps, stderr: object) -> Row:
    """A state that is refused, with one line on stderr."""
    return Row(id, source, *steps, exits(1, stderr))


ROWS = [
    taken("state-good", "1: a hand-made file is taken", take_over()),
    taken(
        "state-no-subsection",
        "1: a reader takes a file without the subsection",
        take_over(partial(encode, subsection=False)),
    ),
    taken("state-tail", "1: bytes after it are ignored", take_over(_with_tail)),
    taken("state-reversed", "1: order", take_over(_reversed)),
    taken("state-unknown-name", "1: order: unknown names are ignored", take_over(_with_unknown)),
    taken("state-twice", "1: order: of two entries the first is used", take_over(_twice)),
    taken("state-only-ram0", "1: only ram0 given, aux ones missing", take_over(_only_ram)),
    taken("state-ram-too-big", "1: RAM file too big", take_over(ram_size=32 << 20)),
    ends(
        "state-magic",
        "1: magic",
        take_over(partial(encode, magic=0x5143504F)),
        stderr="Not a migration stream (bad magic 5143504f)",
    ),
    ends(
        "state-version-2",
        "1: version",
        take_over(partial(encode, version=2)),
        stderr="Unsupported migration stream version 2",
    ),
    ends(
        "state-version-0",
        "1: version",
        take_over(partial(encode, version=0)),
        stderr="Unsupported migration stream version 0",
    ),
    ends(
        "state-short-header",
        "1: version: a file of 4..7 bytes",
        take_over(partial(_cut, 6)),
        stderr="Unsupported migration stream version 0",
    ),
    ends(
        "state-short-magic",
        "1: magic: what is missing of a short file reads as 0",
        take_over(partial(_cut, 3)),
        stderr="Not a migration stream (bad magic 51435000)",
    ),
    ends(
        "state-empty",
        "1: empty file",
        take_over(partial(_cut, 0)),
        stderr="Not a migration stream (bad magic 0)",
    ),
    ends(
        "state-closed-fd",
        "1: closed fd",
        take_over(variable="777"),
        stderr="Not a migration stream (bad magic 0)",
    ),
    ends(
        "state-minus-1",
        "1: -1",
        take_over(variable="-1"),
        stderr="Not a migration stream (bad magic 0)",
    ),
    ends(
        "state-dev-null",
        "1: /dev/null",
        take_over(variable="0"),
        stderr="Not a migration stream (bad magic 0)",
    ),
    ends(
        "state-cut-in-element",
        "1: truncated in an element",
        take_over(partial(_cut, 20)),
        stderr="Failed to load cpr fd state: stream error: -5",
    ),
    ends(
        "state-cut-at-list-end",
        "1: truncated at the list end",
        take_over(_without_end_of_list),
        stderr="Failed to load CprState state: stream error: -5",
    ),
    Row(
        "state-fd-not-open",
        "1: fd in list not open",
        take_over(with_ram(fd=CLOSED)),
        qemu=[exits(ABORTED, like(".*qemu_set_cloexec: Assertion `f != -1' failed."))],
        cpr=[exits(1, like(f".*ram0.*{CLOSED}.*"))],
    ),
    Row(
        "state-fd-negative",
        "1: fd negative",
        take_over(with_ram(fd=-1)),
        qemu=[exits(ABORTED, "**", like(r".*assertion failed: \(elem->fd >= 0\)"))],
        cpr=[exits(1, like(".*ram0.*-1.*"))],
    ),
    *(
        Row(
            f"state-variable-{name}",
            "1: variable not a number",
            take_over(variable=value),
            qemu=[exits(ABORTED, like(".*cpr_exec_find_state: Assertion .* failed."))],
            cpr=[exits(1, like(f".*QEMU_CPR_EXEC_STATE.*'{value}'.*"))],
        )
        for name, value in (("garbage", "garbage"), ("empty", ""), ("trailing", "12x"))
    ),
    ends(
        "state-ram-too-small",
        "1: RAM file too small",
        take_over(ram_size=8 << 20),
        stderr="ram0 backing store size 0x800000 is too small for 'size' option 0x1000000 plus "
        "'offset' option 0x0",
    ),
    *(
        Row(
            f"state-{name}",
            "1: ram0 missing / wrong id / name without NUL",
            take_over(state),
            qemu=[exits(1, LOST)],
            cpr=[exits(1, like(".*ram0.*"))],
        )
        for name, state in (
            ("ram0-missing", _without_ram),
            ("ram0-wrong-id", with_ram(id=1)),
            ("ram0-other-name", with_ram(name="ram1")),
            ("name-without-nul", _ram_name_without_nul),
            ("no-entries", _no_entries),
        )
    ),
    Row(
        "state-without-incoming",
        "1: state present, no -incoming",
        take_over(more=""),
        connect(),
        status("running"),
        migration({}),
        counting(afresh=True),
        hmp(f"xp /1wx {MARK_AT:#x}", f"{MARK_AT:08x}: {MARK:#010x}"),
    ),
    Row(
        "incoming-without-state",
        "1: state absent, -incoming file",
        take_over(None),
        qemu=[exits(1, LOST)],
        cpr=[exits(1, like(".*ram0.*"))],
    ),
    Row(
        "state-and-defer",
        "3: QMP, -incoming defer",
        take_over(more=DEFER),
        connect(),
        status("inmigrate"),
        hmp("info status", "VM status: paused (inmigrate)"),
        migration({}),
        qmp("migrate-incoming", {"uri": "file:$dir/state"}, {}),
        comes_to("running"),
        counting(),
    ),
]
