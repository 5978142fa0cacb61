"""What an update is asked for, checked before anything happens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cpr.live.errors import UpdateError

EARLY, LATE = "early", "late"
FORK, VM = "fork", "vm"
MOST_SECONDS = 1_000_000  # poll(2) takes milliseconds in an int


class Options(NamedTuple):
    """Those of `update`, as they are used; `argv` and `env` are None where nothing was said."""

    argv: list[str] | None
    env: dict[str, str] | None
    timeout: float
    mode: str
    guard: str
    allow: tuple[str, ...]
    back: bool


def check(
    argv: Sequence[str] | None,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
    mode: str = EARLY,
    guard: str = FORK,
    allow: Iterable[str] = (),
    back: bool = False,
) -> Options:
    """Raises UpdateError for what no update can be made with, whatever there is."""
    if mode not in (EARLY, LATE):
        raise UpdateError(f"mode '{mode}' is neither early nor late")
    if guard not in (FORK, VM):
        raise UpdateError(f"guard '{guard}' is neither fork nor vm")
    return Options(
        None if argv is None else check_command(argv),
        None if env is None else check_environment(env),
        check_timeout(timeout),
        mode,
        guard,
        check_allowed(allow),
        bool(back),
    )


def check_command(argv: Sequence[str]) -> list[str]:
    """The words as text.  Raises UpdateError for what cannot be executed whatever there is."""
    try:
        words = None if isinstance(argv, (str, bytes)) else [os.fsdecode(word) for word in argv]
    except TypeError:
        words = None
    if words is None:
        raise UpdateError(f"the command {argv!r} is no list of words")
    if not words or not words[0]:
        raise UpdateError("an empty command cannot be executed")
    for word in words:
        if "\0" in word:
            raise UpdateError(f"the command's {word!r} has a NUL byte in it")
    return words


def check_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables as text.  Raises UpdateError for what no environment can carry."""
    try:
        found = {os.fsdecode(name): os.fsdecode(value) for name, value in dict(env).items()}
    except (TypeError, ValueError):
        raise UpdateError(f"env is {env!r}, which does not map words to words") from None
    for name, value in found.items():
        if not name or "=" in name or "\0" in name + value:
            raise UpdateError(f"env has {name!r}={value!r}, which no environment can carry")
    return found


def check_allowed(allow: Iterable[str]) -> tuple[str, ...]:
    """The words; one alone is a list of one.  Raises UpdateError."""
    try:
        words = (allow,) if isinstance(allow, str) else tuple(map(str, allow))
    except TypeError:
        raise UpdateError(f"allow={allow!r} is neither a word nor a list of them") from None
    return words


def check_timeout(timeout: float) -> float:
    """Seconds.  Raises UpdateError for what is not more than 0, or longer than can be waited."""
    if isinstance(timeout, (int, float)) and 0 < timeout <= MOST_SECONDS:
        return timeout
    raise UpdateError(f"a timeout of {timeout!r} s is none: more than 0, and up to {MOST_SECONDS}")
