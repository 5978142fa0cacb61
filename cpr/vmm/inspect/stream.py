"""A migration stream, item by item.

A section's end is where the stream's own description of its fields says; without a description,
as in a stream that was cut short, it is looked for by its footer.
"""

from __future__ import annotations

from cpr.errors import StateError
from cpr.state import ram_section
from cpr.state import stream as framing
from cpr.state.configuration import VMSTATE_CONFIGURATION, Configuration
from cpr.vmm.inspect import description, values
from cpr.vmm.inspect.cursor import Cursor, Damage, Data
from cpr.vmm.inspect.items import SECTION_KINDS, Item, Stream
from cpr.vmm.inspect.ram import RamWalker
from cpr.vmm.inspect.values import Value

PACKAGED = 8
COMMANDS = {
    1: "OPEN_RETURN_PATH",
    2: "PING",
    3: "POSTCOPY_ADVISE",
    4: "POSTCOPY_LISTEN",
    5: "POSTCOPY_RUN",
    6: "POSTCOPY_RAM_DISCARD",
    7: "POSTCOPY_RESUME",
    PACKAGED: "PACKAGED",
    9: "RECV_BITMAP",
    10: "ENABLE_COLO",
    framing.SWITCHOVER_START: "SWITCHOVER_START",
}
HEADER_SIZE = 6  # of a START or FULL: kind, section_id and the length of the idstr


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
        self._devices: description.Devices | None = None
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
        if command == PACKAGED and size == 4:  # its payload is the length of what comes after it
            size = cursor.integer(4)
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
            self._devices = description.find(self.cursor)
        device = self._devices.get((item.name, item.instance_id))
        if device is None or kind in (framing.PART, framing.END):
            self._find_footer(item)
        else:
            _check_version(item, device)
            item.fields = _decode(self.cursor, device)

    def _find_footer(self, item: Item) -> None:
        """Goes to the first footer of `item` that something plausible comes after."""
        assert item.section_id is not None
        cursor = self.cursor
        footer = bytes([framing.FOOTER]) + item.section_id.to_bytes(4, "big")
        place = cursor.data.find(footer, cursor.offset)
        while place >= 0 and not self._may_begin(place + len(footer)):
            place = cursor.data.find(footer, place + 1)
        cursor.skip(cursor.left() + len(footer) if place < 0 else place - cursor.offset)

    def _may_begin(self, offset: int) -> bool:
        """Whether an item could begin at `offset`, as far as the file goes."""
        header = self.cursor.data[offset : offset + HEADER_SIZE]
        kind = header[0] if header else framing.EOF
        if kind in (framing.START, framing.FULL):
            length = int.from_bytes(header[5:], "big")
            name = self.cursor.data[offset + HEADER_SIZE : offset + HEADER_SIZE + length]
            plausible = length > 0 or len(header) < HEADER_SIZE
            return plausible and name.isascii() and name.decode().isprintable()
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
            raise Damage(cursor.offset, "the file ends here, without a description of the fields")
        kind = cursor.integer(1)
        if kind != framing.VMDESCRIPTION:
            raise Damage(item.offset, f"Expected vmdescription section, but got {kind}")
        item.body_size = cursor.integer(4)
        item.body_offset = cursor.offset
        description.parse(cursor.read(item.body_size), item.body_offset)
        self._add(item)


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
