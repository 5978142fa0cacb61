"""A row of the table: its name, where it comes from, and its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from .match import Mismatch, Unavailable

if TYPE_CHECKING:
    from .lab import Lab
    from .target import Target


STDERR = 5
"""How many of the last lines on stderr a report has."""


class Step:
    """One thing to do or to look at; it raises Mismatch where something else was seen."""

    def __init__(self, function: Callable[..., None], args: tuple, kwargs: dict) -> None:
        self._function = function
        self._args = args
        self._kwargs = kwargs

    def __call__(self, lab: Lab) -> None:
        self._function(lab, *self._args, **self._kwargs)

    def __str__(self) -> str:
        words = [repr(arg) for arg in self._args]
        words += [f"{name}={value!r}" for name, value in self._kwargs.items()]
        return f"{self._function.__name__}({', '.join(words)})"

    __repr__ = __str__


Steps: TypeAlias = "Step | Iterable[Steps]"
"""What a row is written with: steps, and lists of them at any depth."""


def step(function: Callable[..., None]) -> Callable[..., Step]:
    """Makes a function of a Lab, and of what a row writes in brackets, a maker of steps."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Step:
        return Step(function, args, kwargs)

    return make


def flatten(steps: Steps) -> list[Step]:
    if isinstance(steps, Step):
        return [steps]
    return [one for each in steps for one in flatten(each)]


class Row:
    """`steps`, then those of the VMM under test where QEMU and this VMM differ on purpose.

    `source` is "PART: LINE", see facts.py.
    """

    def __init__(
        self, id: str, source: str, *steps: Steps, qemu: Steps = (), cpr: Steps = ()
    ) -> None:
        self.id = id
        self.source = source
        self._steps = flatten(steps)
        self._own = {"qemu": flatten(qemu), "cpr": flatten(cpr)}

    @property
    def differs(self) -> bool:
        """Whether the two VMMs are expected to do different things."""
        return any(self._own.values())

    def steps(self, target: str) -> list[Step]:
        return self._steps + self._own[target]

    def run(self, target: Target) -> None:
        """Raises Mismatch with the step that failed, and the ones before it, and Unavailable."""
        done: list[str] = []
        with target.lab() as lab:
            for each in self.steps(target.name):
                try:
                    each(lab)
                except Unavailable:
                    raise
                except Exception as error:
                    raise Mismatch(self._report(done, each, error, lab)) from error
                done.append(str(each))

    def _report(self, done: list[str], failed: Step, error: Exception, lab: Lab) -> str:
        name = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
        lines = [f"{self.id} ({self.source})", *(f"  ok    {text}" for text in done)]
        lines += [f"  FAILS {failed}", f"    {name}{error}"]
        for vm in lab.vms.values():
            lines += [
                f"    stderr of {vm.name}: {line}" for line in vm.process.stderr_lines()[-STDERR:]
            ]
        return "\n".join(lines)
