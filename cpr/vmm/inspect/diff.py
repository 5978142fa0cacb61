"""Two CPR states, or two migration streams, compared field by field.

Offsets, section ids and the order of the parts do not count: no reader depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from cpr.errors import CprError
from cpr.state.ram_section import PAGE_SIZE
from cpr.vmm.inspect.cpr_state import State
from cpr.vmm.inspect.cursor import Data
from cpr.vmm.inspect.ram import NO_PLACE, ZERO_PAGE, Block
from cpr.vmm.inspect.stream import Item, Stream
from cpr.vmm.inspect.text import scalar
from cpr.vmm.inspect.values import Value, leaves

PAGES_NAMED = 8


class Difference(NamedTuple):
    """What differs: where, the two values (None: not there), and the sentence about it."""

    where: str
    a: Any
    b: Any
    text: str

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def compare(a: object, b: object, selected: Any) -> list[Difference]:
    """The differences; `selected(name)` says which entries or sections count.

    Raises CprError for a state and a stream, which have nothing in common.
    """
    if isinstance(a, State) and isinstance(b, State):
        return list(_states(a, b, selected))
    if isinstance(a, Stream) and isinstance(b, Stream):
        return list(_streams(a, b, selected))
    raise CprError("a CprState and a migration stream cannot be compared")
