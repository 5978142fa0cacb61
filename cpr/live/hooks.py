"""The functions that a program gives for the moments of an update: an error has their name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cpr.live.errors import UpdateError, reason_of


def name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))


def failed(moment: str, function: Any, error: Exception) -> UpdateError:
    """What is raised for an error of a function of `moment`, which is its cause."""
    return UpdateError(f"{name_of(function)}, of {moment}, failed: {reason_of(error)}")


def call(moment: str, function: Callable[[], Any]) -> Any:
    """What it returns.  Raises UpdateError, and MemoryError as it is."""
    try:
        return function()
    except MemoryError:
        raise
    except Exception as error:
        raise failed(moment, function, error) from error


def call_all(moment: str, functions: Iterable[Callable[[], Any]]) -> None:
    """Calls all of them, and then raises UpdateError for the first that has failed."""
    first: UpdateError | None = None
    for function in functions:
        try:
            call(moment, function)
        except Exception as error:
            found = error if isinstance(error, UpdateError) else failed(moment, function, error)
            first = first or found
    if first is not None:
        raise first
