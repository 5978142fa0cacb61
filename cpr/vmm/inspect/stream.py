"""A migration stream, item by item.

A section's end is where the stream's own description of its fields says; without a description,
as in a stream that was cut short, it is looked for by its footer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID

from cpr.errors import StateError
from cpr.state import ram_section
from cpr.state import stream as framing
from cpr.state.configuration import VMSTATE_CONFIGURATION, Configuration
from cpr.vmm.inspect import values
from cpr.vmm.inspect.cursor import Cursor, Damage, Data, Flaw
from cpr.vmm.inspect.ram import Block, RamWalker
from cpr.vmm.inspect.values import Value

SECTION_KINDS = {
    framing.START: "START",
    framing.PART: "PART",
    framing.END: "END",
    framing.FULL: "FULL",
}
COMMANDS = {
    1: "OPEN_RETURN_PATH",
    2: "PING",
    3: "POSTCOPY_ADVISE",
    4: "POSTCOPY_LISTEN",
    5: "POSTCOPY_RUN",
    6: "POSTCOPY_RAM_DISCARD",
    7: "POSTCOPY_RESUME",
    8: "PACKAGED",
    9: "RECV_BITMAP",
    10: "ENABLE_COLO",
    framing.SWITCHOVER_START: "SWITCHOVER_START",
}
STATE_KINDS = frozenset({"CONFIGURATION", "COMMAND", *SECTION_KINDS.values()})
"""The kinds of item that say something of the guest or to the reader, not of the stream."""

FOOTER_SIZE = 5
DESCRIPTION_BEGINS = re.compile(
    rb'\x00\x06(....)(?=\{\s*"(?:configuration|page_size|devices)")', re.DOTALL
)


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


def inspect(data: Data, offset: int = 0, keep_places: bool = False) -> Stream:
    """Reads the stream that begins at `offset`; never raises for what is in it.

    `keep_places`: remember where each RAM page is, so that they can be compared.
    """
    stream = Stream(data, offset)
    cursor = Cursor(data, offset)
    try:
        _Parser(stream, cursor, keep_places).parse()
    except StateError as error:
        stream.flaws.append(cursor.flaw(error))
    return stream


class _Parser:
    """Takes a stream from `cursor` and puts what it finds into `stream`."""

    def __init__(self, stream: Stream, cursor: Cursor, keep_places: bool) -> None:
        self.stream = stream
        self.cursor = cursor
        self._keep_places = keep_places
        self._started: dict[int, Item] = {}
        self._devices: dict[tuple[str, int], dict] | None = None
        self._ram = RamWalker(False, False, False)

    def parse(self) -> None:
        cursor = self.cursor
        cursor.enter("the header")
        cursor.skip(4)
        version = cursor.integer(4)
        if version != framing.VERSION:
            raise Damage(
                cursor.offset - 4,
                f"Unsupported migration stream version, "
                f"file version {version:x} != {framing.VERSION:x}",
            )
        self._take_configuration()
        begin = cursor.offset
        while True:
            cursor.enter("the list of sections", begin)
            if not self._take_item():
                break
        self._take_description()
        if cursor.left():
            raise Damage(cursor.offset, f"{cursor.left()} bytes after the end of the stream")

    def _add(self, item: Item) -> None:
        """`item` ends here."""
        item.size = self.cursor.offset - item.offset
        self.stream.items.append(item)

    def _take_configuration(self) -> None:
        cursor = self.cursor
        cursor.enter("the configuration")
        item = Item(cursor.offset, "CONFIGURATION", VMSTATE_CONFIGURATION.name)
        kind = cursor.integer(1)
        if kind != framing.CONFIGURATION:
            raise Damage(
                item.offset, f"Configuration section missing, {kind:x} != {framing.CONFIGURATION:x}"
            )
        item.body_offset = cursor.offset
        state = VMSTATE_CONFIGURATION.decode(cursor, VMSTATE_CONFIGURATION.version_id)
        item.body_size = cursor.offset - item.body_offset
        item.fields = values.decode(
            Cursor(cursor.data, item.body_offset), VMSTATE_CONFIGURATION.describe(state)
        )
        self._add(item)
        configuration = self.stream.configuration = Configuration.from_state(state)
        self._ram = RamWalker(
            "x-ignore-shared" in configuration.capabilities,
            "mapped-ram" in configuration.capabilities,
            self._keep_places,
        )
        self.stream.blocks = self._ram.blocks

    def _take_item(self) -> bool:
        """Takes an item of any kind; False for the EOF mark."""
        begin = self.cursor.offset
        kind = self.cursor.integer(1)
        if kind in SECTION_KINDS:
            self._take_section(begin, kind)
        elif kind == framing.COMMAND:
            self._take_command(begin)
        elif kind == framing.EOF:
            self._add(Item(begin, "EOF", body_offset=self.cursor.offset))
            return False
        else:
            raise Damage(begin, f"Unknown section type {kind}")
        return True

    def _take_command(self, begin: int) -> None:
        cursor = self.cursor
        cursor.enter("a command", begin)
        command, size = cursor.integer(2), cursor.integer(2)
        if command not in COMMANDS:
            raise Damage(begin, f"MIG_CMD {command:#x} unknown (len {size:#x})")
        item = Item(begin, "COMMAND", COMMANDS[command], body_offset=cursor.offset, body_size=size)
        cursor.skip(size)
        self._add(item)

    def _take_section(self, begin: int, kind: int) -> None:
        cursor = self.cursor
        cursor.enter("a section", begin)
        section_id = cursor.integer(4)
        item = Item(begin, SECTION_KINDS[kind], section_id=section_id)
        if kind in (framing.START, framing.FULL):
            item.name = cursor.name()
            if not item.name:
                raise Damage(
                    cursor.offset - 1, f"Unable to read ID string for section {section_id}"
                )
            cursor.enter(f"section {section_id} '{item.name}'", begin)
            item.instance_id, item.version_id = cursor.integer(4), cursor.integer(4)
            self._started[section_id] = item
        else:
            start = self._started.get(section_id)
            if start is None:
                raise Damage(begin + 1, f"Unknown section {section_id}")
            item.name = start.name
            item.instance_id, item.version_id = start.instance_id, start.version_id
            cursor.enter(f"the {item.kind} of section {section_id} '{item.name}'", begin)
        item.body_offset = cursor.offset
        self._take_body(item, kind)
        item.body_size = cursor.offset - item.body_offset
        self._take_footer(item)
        self._add(item)

    def _take_body(self, item: Item, kind: int) -> None:
        assert item.instance_id is not None
        assert item.version_id is not None
        if item.name == ram_section.IDSTR:
            before = self._ram.pages()
            self._ram.walk(self.cursor, item.version_id)
            item.pages = self._ram.pages() - before
            return
        if self._devices is None:
            self._devices = _find_devices(self.cursor)
        device = self._devices.get((item.name, item.instance_id))
        if device is None or kind in (framing.PART, framing.END):
            self._find_footer(item)
        else:
            _check_version(item, device)
            item.fields = _decode(self.cursor, device)

    def _find_footer(self, item: Item) -> None:
        """Goes to the first footer of `item` that something plausible comes after."""
        cursor = self.cursor
        footer = _footer(item)
        place = cursor.data.find(footer, cursor.offset)
        while place >= 0 and not self._may_begin(place + FOOTER_SIZE):
            place = cursor.data.find(footer, place + 1)
        cursor.skip(cursor.left() + FOOTER_SIZE if place < 0 else place - cursor.offset)

    def _may_begin(self, offset: int) -> bool:
        """Whether an item could begin at `offset`, as far as there is one."""
        header = self.cursor.data[offset : offset + 6]
        kind = header[0] if header else framing.EOF
        if kind in (framing.START, framing.FULL):
            name = self.cursor.data[offset + 6 : offset + 6 + header[-1]] if header[5:] else b"?"
            return name.isascii() and name.decode().isprintable()
        if kind in (framing.PART, framing.END):
            return len(header) < 5 or int.from_bytes(header[1:5], "big") in self._started
        if kind == framing.COMMAND:
            return len(header) < 3 or int.from_bytes(header[1:3], "big") in COMMANDS
        return kind == framing.EOF and header[1:2] in (b"", bytes([framing.VMDESCRIPTION]))

    def _take_footer(self, item: Item) -> None:
        begin = self.cursor.offset
        mark = self.cursor.integer(1)
        if mark != framing.FOOTER:
            raise Damage(begin, f"Missing section footer for {item.name}")
        found = self.cursor.integer(4)
        if found != item.section_id:
            raise Damage(
                begin + 1,
                f"Mismatched section id in footer for {item.name} - "
                f"read 0x{found:x} expected 0x{item.section_id:x}",
            )

    def _take_description(self) -> None:
        cursor = self.cursor
        cursor.enter("the description")
        item = Item(cursor.offset, "VMDESCRIPTION")
        if not cursor.left():
            raise Damage(cursor.offset, "the file ends here, without a description of its fields")
        kind = cursor.integer(1)
        if kind != framing.VMDESCRIPTION:
            raise Damage(item.offset, f"Expected vmdescription section, but got {kind}")
        item.body_size = cursor.integer(4)
        item.body_offset = cursor.offset
        _devices_of(cursor.read(item.body_size), item.body_offset)
        self._add(item)


def _footer(item: Item) -> bytes:
    assert item.section_id is not None
    return bytes([framing.FOOTER]) + item.section_id.to_bytes(4, "big")


def _check_version(item: Item, device: dict) -> None:
    described = device.get("version", item.version_id)  # there is none for some old devices
    if described != item.version_id:
        raise Damage(
            item.body_offset - 4,
            f"section {item.section_id} '{item.name}' has version {item.version_id}, "
            f"but is described as version {described}",
        )


def _decode(cursor: Cursor, device: dict) -> list[Value]:
    begin = cursor.offset
    try:
        return values.decode(cursor, device)
    except RecursionError:
        raise Damage(begin, "the description of this section is nested too deeply") from None


def _find_devices(cursor: Cursor) -> dict[tuple[str, int], dict]:
    """The description at the end of the stream, behind `cursor`; empty where it cannot be used.

    Of several places that look like one it is the last: guest RAM may hold anything.
    """
    match = None
    for each in DESCRIPTION_BEGINS.finditer(cursor.data, cursor.offset):
        match = each
    if match is None:
        return {}
    size = int.from_bytes(match[1], "big")
    text = cursor.data[match.end() : match.end() + size]
    try:
        return _devices_of(text, match.end())
    except Damage:
        return {}  # it is reported when its turn comes


def _devices_of(text: bytes, offset: int) -> dict[tuple[str, int], dict]:
    """The description of each (name, instance_id) in `text`, which is at `offset`."""
    try:
        description = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise Damage(offset, f"the description is not JSON: {error}") from None
    try:
        return {(each["name"], each["instance_id"]): each for each in description["devices"]}
    except (KeyError, TypeError):
        raise Damage(offset, "the description does not describe any devices") from None
