"""An update, from top to bottom: a process gets a new program, and goes on if that fails.

    old image (old_image.Update)                    new image (new_image.Predecessor), same PID
    threads have ended; token, page and socketpair
    execute: clone(CLONE_VM), execve  ───────────►  starts
    early: the guard, which is the old image, goes
    on at once
                                      ◄───────────  hello
    state, descriptors                ───────────►  builds all that it needs
                                      ◄───────────  ready
    stops; hand-over: what was left   ───────────►  loads it
                                                    takes the token: it is its own from here on
    the token is gone: closes all descriptors, frees its memory, ends; before that, to a new image
    that speaks version 2: connections, what has been left for when the new image goes on

A late update has no hello: the state goes over the exec, and the old image comes back only where
the new one ends, is past its deadline, or refuses.  Until the token is taken the old image may take
it itself, and has all that it had.

A new image that refuses says so (refuse) and is told what to do: to execute the old command, which
then asks for everything in the same way and so has the PID again (back), or to end (end).

CPR_LIVE in the environment is "TOKEN,PAGE,SOCKET,MODE": three descriptors, and early, late or
rehearse.  A rehearsal is a child that goes as far as ready, and is thanked.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for

from cpr.errors import CprError

VARIABLE = "CPR_LIVE"
EXEC_PID = "SYSTEMD_EXEC_PID"
"""Who is the manager's own child (systemd.exec(5))."""
EARLY, LATE, REHEARSE = "early", "late", "rehearse"
PROTOCOL = 1
"""The version of what is said; a program that has another one is updated late."""
KEEPS = 2
"""Is spoken besides by a program that takes connections."""
HEARS = 3
"""Is spoken besides by a program that repeats what the environment has for it when it is asked."""
RAM_FILES = 4
"""Is spoken besides by a VMM that takes files that are guest RAM by descriptor."""
VERSIONS = (PROTOCOL, KEEPS, HEARS, RAM_FILES)

HELLO, STATE, READY, HAND_OVER = "hello", "state", "ready", "hand-over"
CONNECTIONS = "connections"
REFUSE, BACK, END = "refuse", "back", "end"
LEFT_OPEN = "left open"
"""In a message that was queued before a late exec: the numbers of its descriptors."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The signals that end a VM, at any moment of an update too."""

# What the old image does next; a message that the row does not have ends the update.
STARTING, BUILDING, PREPARED, GOING, RETURNING, CLOSED = (
    "starting",
    "building",
    "ready",
    "handing over",
    "returning",
    "closed",
)
TRANSITIONS: dict[str, frozenset[str]] = {
    STARTING: frozenset({BUILDING, RETURNING, CLOSED}),
    BUILDING: frozenset({PREPARED, RETURNING, CLOSED}),
    PREPARED: frozenset({GOING, RETURNING, CLOSED}),
    GOING: frozenset({RETURNING, CLOSED}),
    RETURNING: frozenset({BUILDING, RETURNING, CLOSED}),
    CLOSED: frozenset(),
}
AFTER = {HELLO: BUILDING, READY: PREPARED, REFUSE: RETURNING}


class UpdateError(CprError):
    """The update has failed, and the old image goes on.

    `pid_changed`: the old image is in another process now.  `ended_by`: the signal that ended the
    new image, or was sent to it in vain, if it is one of ENDING, and so meant for both.
    `status` is the new image's wait status, or None.
    """

    def __init__(
        self,
        text: str,
        pid_changed: bool = False,
        ended_by: int = 0,
        status: int | None = None,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.pid_changed = pid_changed
        self.ended_by = ended_by
