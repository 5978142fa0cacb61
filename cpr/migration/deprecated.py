"""Migration parameters of an earlier release that do nothing any more.

Command lines and clients of that release still set them: that is no reason not to start, or to
refuse an update.
"""

from __future__ import annotations

from cpr.migration.parameter import BOOL, Parameter
from cpr.report import warn_report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

# Of 0.1.0; a guard does what both were for.
PARAMETERS = {
    name: Parameter(name, BOOL, True) for name in ("x-cpr-early-resume", "x-cpr-mm-holder")
}


def without(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` without them.  Raises CommandError for a value of the wrong type."""
    left = dict(changes)
    for name, parameter in PARAMETERS.items():
        if name in left:
            parameter.convert(left.pop(name))
    return left


def warn(names: Iterable[str]) -> None:
    """Says which of `names` do nothing."""
    for name in names:
        if name in PARAMETERS:
            warn_report(f"migration parameter '{name}' is deprecated, and does nothing")
