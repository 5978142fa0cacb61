"""What a program that updates itself is told."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cpr.errors import CprError
from cpr.live import transaction


class PreserveError(CprError, ValueError):
    """A name, or what is to be preserved under it, cannot be used; the text has the name."""


class UpdateError(transaction.UpdateError):
    """The update has failed, and this program goes on with all that it had.

    `reason` says why in a sentence.  `status` is the exit status of the new program and `signal`
    the signal that ended it, None where there is none.  `ended_by`: that signal, or one that the
    new program had not taken, if it is one that ends a service, else 0.  `pid_changed`: this
    program is in another process now.  `stderr` are the last lines that the new program wrote
    there.
    """

    def __init__(
        self,
        reason: str,
        wait_status: int | None = None,
        pid_changed: bool = False,
        stderr: Sequence[str] = (),
        ended_by: int = 0,
    ) -> None:
        text = f"{reason} (its last words: {stderr[-1]})" if stderr else reason
        super().__init__(text, pid_changed, ended_by)
        self.reason = reason
        self.stderr = list(stderr)
        self.wait_status = wait_status
        self.signal: int | None = None
        if wait_status is not None and os.WIFSIGNALED(wait_status):
            self.signal = os.WTERMSIG(wait_status)
            if self.signal in transaction.ENDING:
                self.ended_by = self.signal
        elif wait_status is not None:
            self.status = os.WEXITSTATUS(wait_status)


def cause_of(error: Exception) -> BaseException | None:
    """The cause of what is raised in place of `error`: itself, where it is none of ours."""
    return error.__cause__ if isinstance(error, UpdateError) else error


def reason_of(error: BaseException) -> str:
    """Why an update or a rehearsal came to nothing; never empty."""
    if isinstance(error, MemoryError):
        return "there is no memory for the update"
    reason: str = getattr(error, "reason", str(error) if isinstance(error, CprError) else "")
    return reason or repr(error)
