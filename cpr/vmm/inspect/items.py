"""What an inspection of a migration stream finds: items, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID

from cpr.state import ram_section
from cpr.state import stream as framing
from cpr.state.configuration import Configuration
from cpr.vmm.inspect.cursor import Data, Flaw
from cpr.vmm.inspect.ram import Block
from cpr.vmm.inspect.values import Value

SECTION_KINDS = {
    framing.START: "START",
    framing.PART: "PART",
    framing.END: "END",
    framing.FULL: "FULL",
}
STATE_KINDS = frozenset({"CONFIGURATION", "COMMAND", *SECTION_KINDS.values()})
"""The kinds of item that say something of the guest or to the reader, not of the stream."""


@dataclass
class Item:
    """A section, a command or another part of a stream; all offsets and sizes in bytes.

    `size` is the whole item's, header and footer included.  `fields` is None where there is no
    description, `pages` the number of RAM pages in it.
    """

    offset: int
    kind: str
    name: str = ""
    section_id: int | None = None
    instance_id: int | None = None
    version_id: int | None = None
    size: int = 0
    body_offset: int = 0
    body_size: int = 0
    fields: list[Value] | None = None
    pages: int | None = None

    @property
    def key(self) -> str:
        """What it is called where several streams are compared."""
        return self.name if self.instance_id is None else f"{self.name}/{self.instance_id}"

    def to_json(self, with_fields: bool) -> dict[str, Any]:
        entry = {key: value for key, value in vars(self).items() if value is not None}
        entry.pop("fields", None)
        if with_fields and self.fields is not None:
            entry["fields"] = [value.to_json() for value in self.fields]
        return entry


@dataclass
class Stream:
    """What an inspection of a migration stream has found, up to its first flaw."""

    kind: ClassVar[str] = "migration stream"
    data: Data
    offset: int = 0
    configuration: Configuration | None = None
    items: list[Item] = field(default_factory=list)
    blocks: dict[str, Block] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)

    def select(self, selected: Callable[[str], bool]) -> int:
        """Keeps the items whose name is `selected`; returns how many."""
        self.items = [item for item in self.items if selected(item.name)]
        if not selected(ram_section.IDSTR):
            self.blocks = {}
        return len(self.items)

    def to_json(self, with_fields: bool) -> dict[str, Any]:
        head: dict[str, Any] = {"kind": self.kind, "size": len(self.data) - self.offset}
        if self.configuration is not None:
            uuid = self.configuration.uuid
            head["machine"] = self.configuration.machine
            head["capabilities"] = list(self.configuration.capabilities)
            head["uuid"] = str(UUID(bytes=uuid)) if uuid else None
        head["items"] = [item.to_json(with_fields) for item in self.items]
        head["ram"] = [block.to_json() for block in self.blocks.values()]
        return head
