"""The steps of every way to update, and what becomes of the guest where one has a fault.

A step is a fault point (cpr/faults.py).  The outcomes of a row are for a step that fails, that
hangs, and whose process is killed.
"""

from __future__ import annotations

from typing import NamedTuple

NEW = "in the new VMM"
OLD = "in the old VMM"
MOVED = "in the old VMM, other PID"
CONT = "in the source"
ENDED = "ended: its process was killed"
FAULTS = ("fail", "hang", "kill")

OUTCOMES = {
    NEW: "the guest goes on in the new VMM; what could not be made there is missing and reported",
    OLD: "the guest goes on in the old VMM under its PID; the update has failed, and tells why",
    MOVED: "the same, in the guard's process, as the new one has ended without a word or was ended",
    CONT: "the target has ended: the guest runs in the source, or does after `cont`",
    ENDED: "the process that had the guest was killed; nothing of the VM is left",
}


class Row(NamedTuple):
    """One step: whose it is, and the outcome of each of FAULTS."""

    way: str
    step: str
    side: str
    what: str
    fail: str
    hang: str
    kill: str

    def outcome(self, fault: str) -> str:
        return str(getattr(self, fault))


def old(way: str, step: str, what: str, fail: str = OLD, hang: str = NEW, kill: str = ENDED) -> Row:
    return Row(way, step, "old", what, fail, hang, kill)


def new(
    way: str, step: str, what: str, fail: str = OLD, hang: str = MOVED, kill: str = MOVED
) -> Row:
    return Row(way, step, "new", what, fail, hang, kill)


def child(step: str, what: str) -> Row:
    return Row("rehearsal", step, "new", what, OLD, OLD, OLD)


def target(step: str, what: str) -> Row:
    """The target has the RAM then, and the source has ended its part."""
    return Row("transfer", step, "new", what, CONT, NEW, CONT)


def late_side(way: str) -> list[Row]:
    """What comes when the guest is the new VMM's already."""
    return [
        new(way, "resume", "the token is taken; the vCPUs are let go", NEW, NEW, ENDED),
        new(way, "run", "the guest runs", NEW, NEW, ENDED),
        new(way, "chardev", "chardevs and monitors are made", NEW, NEW, ENDED),
    ]


EARLY = [
    old("early", "park", "threads are ended"),
    old("early", "exec", "clone and execve"),
    new("early", "config", "the new VMM reads its command line", MOVED),
    new("early", "ask", "it says hello"),
    old("early", "hello", "the old VMM sends the CPR state", MOVED),
    new("early", "map", "VM and RAM are made"),
    new("early", "vcpu", "vCPUs and devices are made"),
    new("early", "populate", "RAM is populated"),
    new("early", "ready", "the new VMM is ready"),
    old("early", "stop", "the guest is stopped", MOVED),
    old("early", "save", "its state is written", MOVED),
    old("early", "hand-over", "and sent", MOVED),
    new("early", "load", "it is loaded"),
    new("early", "commit", "the token is taken"),
    *late_side("early"),
    new("early", "end", "the new VMM says what it took", NEW, NEW, ENDED),
    old("early", "leave", "the old VMM ends", NEW, NEW, NEW),
]
LATE = [
    old("late", "begin", "the CPR state is written"),
    old("late", "stop", "the guest is stopped"),
    old("late", "save", "its state is written"),
    old("late", "devices", "that of the devices"),
    old("late", "complete", "the stream is closed"),
    old("late", "finish", "the exec is made ready"),
    old("late", "exec", "clone and execve"),
    new("late", "config", "the new VMM reads its command line", MOVED),
    new("late", "map", "VM and RAM are made"),
    new("late", "vcpu", "vCPUs and devices are made"),
    new("late", "load", "the stream is loaded"),
    new("late", "commit", "the token is taken"),
    *late_side("late"),
]
REFUSED = [
    old("refused", "give-back", "the old command is to be executed again", MOVED, OLD),
]
REFUSED_LATE = [
    old("refused late", "refused", "the new program's refusal is read", MOVED, OLD),
    old("refused late", "give-back", "the old command is to be executed again", MOVED, OLD),
]
STAGING = [
    old("staging", "pass", "RAM is copied while the guest runs"),
    old("staging", "stop", "the guest is stopped"),
    old("staging", "last-pass", "the last pages are copied"),
    old("staging", "devices", "the state of the devices is written"),
    new("staging", "map", "the copies are mapped", MOVED),
    new("staging", "load", "the stream is loaded", MOVED),
    new("staging", "resume", "the token is taken; the vCPUs are let go", NEW, NEW, ENDED),
]
REHEARSAL = [
    child("config", "the child reads its command line"),
    child("ask", "it says hello"),
    child("map", "VM and RAM are made"),
    child("vcpu", "vCPUs and devices are made"),
]
TRANSFER = [
    old("transfer", "send", "the source sends the CPR state"),
    new("transfer", "receive", "the target receives it", OLD, NEW, OLD),
    new("transfer", "map", "VM and RAM are made", OLD, NEW, OLD),
    old("transfer", "stop", "the guest is stopped"),
    old("transfer", "devices", "the state of the devices is written"),
    target("load", "it is loaded"),
    old("transfer", "given-away", "the source gives up its lock on the RAM", NEW, NEW, NEW),
    target("commit", "the guest is the target's"),
    new("transfer", "resume", "the vCPUs are let go", NEW, NEW, CONT),
]
REBOOT = [
    old("reboot", "stop", "the guest is stopped"),
    old("reboot", "save", "RAM is written"),
    old("reboot", "devices", "the state of the devices is written"),
    old("reboot", "complete", "the stream is closed"),
]
ROWS = [*EARLY, *LATE, *REFUSED, *REFUSED_LATE, *STAGING, *REHEARSAL, *TRANSFER, *REBOOT]
