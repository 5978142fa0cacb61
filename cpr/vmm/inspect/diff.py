"""Two CPR states, or two migration streams, compared field by field.

Offsets, section ids, the order of the parts and how often a page was sent do not count: no reader
depends on them.  Of several entries with one name and id the first counts, as for a reader.  A page
of which only one file has the content is taken to differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from cpr.errors import CprError
from cpr.state.ram_section import PAGE_SIZE
from cpr.vmm.inspect.cpr_state import Device, Entry, State
from cpr.vmm.inspect.cursor import Data
from cpr.vmm.inspect.items import STATE_KINDS, Item, Stream
from cpr.vmm.inspect.ram import NO_PLACE, ZERO_PAGE, Block
from cpr.vmm.inspect.text import printable, scalar
from cpr.vmm.inspect.values import Content, Value, leaves, plain

DESCRIPTOR_ATTRIBUTES = ("target", "inode", "size", "seals", "cloexec")
PAGES_NAMED = 8  # of those that differ

T = TypeVar("T")


class Difference(NamedTuple):
    """What differs: the two values as JSON has them (None: not there), and a sentence about it."""

    where: str
    a: Any
    b: Any
    text: str


def compare(a: object, b: object) -> list[Difference]:
    """The differences.  Raises CprError for two files that are not of one kind."""
    if isinstance(a, State) and isinstance(b, State):
        return list(_states(a, b))
    if isinstance(a, Stream) and isinstance(b, Stream):
        return list(_streams(a, b))
    raise CprError("only two CPR states, or two migration streams, can be compared")


def _states(a: State, b: State) -> Iterator[Difference]:
    for where, x, y in _pairs(_entries(a), _entries(b)):
        if x is None or y is None:
            yield _only(where, x and x.fd, y and y.fd)
            continue
        yield from _attributes(where, x, y, ("fd",))
        if x.descriptor is not None and y.descriptor is not None:
            yield from _attributes(where, x.descriptor, y.descriptor, DESCRIPTOR_ATTRIBUTES)
    for where, v, w in _pairs(_devices(a), _devices(b)):
        if v is None or w is None:
            yield _only(where, v and v.devid, w and w.devid)
        else:
            yield from _attributes(where, v, w, ("devid", "ioas_id", "hwpt_id"))


def _entries(state: State) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for entry in state.entries:
        entries.setdefault(f"entry '{entry.name}' id {entry.id}", entry)
    return entries


def _devices(state: State) -> dict[str, Device]:
    return {f"VFIO device '{device.name}'": device for device in state.devices}


def _attributes(where: str, a: object, b: object, names: tuple[str, ...]) -> Iterator[Difference]:
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            yield _changed(f"{where} {name}", x, y, _word(x), _word(y))


def _streams(a: Stream, b: Stream) -> Iterator[Difference]:
    for where, xs, ys in _pairs(_items(a), _items(b)):
        if xs is None or ys is None:
            yield _only(where, xs and len(xs), ys and len(ys))
        else:
            yield from _sections(where, (a.data, xs), (b.data, ys))
    for where, x, y in _pairs(_blocks(a), _blocks(b)):
        if x is None or y is None:
            yield _only(where, x and x.used_length, y and y.used_length)
        else:
            yield from _block(where, (a.data, x), (b.data, y))


def _items(stream: Stream) -> dict[str, list[Item]]:
    """The items that hold any state, in groups: the START, PARTs and END of a section are one."""
    groups: dict[str, list[Item]] = {}
    for item in stream.items:
        if item.kind in STATE_KINDS:
            groups.setdefault(item.key, []).append(item)
    return groups


def _sections(
    where: str, a: tuple[Data, list[Item]], b: tuple[Data, list[Item]]
) -> Iterator[Difference]:
    (a_data, xs), (b_data, ys) = a, b
    x, y = xs[0], ys[0]
    if x.version_id != y.version_id:
        versions = str(x.version_id), str(y.version_id)
        yield _changed(f"{where} version", x.version_id, y.version_id, *versions)
    if x.pages is not None:
        return
    if x.fields is not None and y.fields is not None:
        yield from _fields(where, x.fields, y.fields)
        return
    a_body = b"".join(a_data[i.body_offset : i.body_offset + i.body_size] for i in xs)
    b_body = b"".join(b_data[i.body_offset : i.body_offset + i.body_size] for i in ys)
    if a_body != b_body:
        yield _bytes(f"{where} body", a_body, b_body)


def _fields(where: str, a: list[Value], b: list[Value]) -> Iterator[Difference]:
    for name, x, y in _pairs(dict(leaves(a)), dict(leaves(b))):
        place = f"{where} {name}"
        if x is None or y is None:
            yield _only(place, x and plain(x.value), y and plain(y.value))
        elif x.type != y.type:
            yield _changed(f"{place} type", x.type, y.type, x.type, y.type)
        elif x.value != y.value:
            yield from _values(place, x.type, x.value, y.value)


def _values(place: str, kind: str, a: Content, b: Content) -> Iterator[Difference]:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                yield from _values(f"{place}[{number}]", kind, x, y)
    elif isinstance(a, bytes) and isinstance(b, bytes):
        yield _bytes(place, a, b)
    else:
        yield _changed(place, plain(a), plain(b), scalar(a, kind), scalar(b, kind))


def _blocks(stream: Stream) -> dict[str, Block]:
    return {f"RAM block '{idstr}'": block for idstr, block in stream.blocks.items()}


def _block(where: str, a: tuple[Data, Block], b: tuple[Data, Block]) -> Iterator[Difference]:
    (a_data, x), (b_data, y) = a, b
    yield from _attributes(where, x, y, ("used_length",))
    if x.address is not None and y.address is not None and x.address != y.address:
        addresses = hex(x.address), hex(y.address)
        yield _changed(f"{where} address", x.address, y.address, *addresses)
    pages = [
        offset
        for offset in sorted(x.places.keys() | y.places.keys())
        if (page := _page(a_data, x, offset)) is None or page != _page(b_data, y, offset)
    ]
    if pages:
        named = ", ".join(map(hex, pages[:PAGES_NAMED]))
        more = ", …" if len(pages) > PAGES_NAMED else ""
        text = f"{where}: {len(pages)} pages differ, at {named}{more}"
        yield Difference(f"{where} pages", pages, pages, text)


def _page(data: Data, block: Block, offset: int) -> bytes | None:
    """The content of a page; None for one that is not in the stream or only as a difference."""
    place = block.places.get(offset, NO_PLACE)
    if place == NO_PLACE:
        return None
    return bytes(PAGE_SIZE) if place == ZERO_PAGE else data[place : place + PAGE_SIZE]


def _pairs(a: dict[str, T], b: dict[str, T]) -> Iterator[tuple[str, T | None, T | None]]:
    for key in a | b:
        yield key, a.get(key), b.get(key)


def _only(where: str, a: Any, b: Any) -> Difference:
    return Difference(where, a, b, f"{where} is only in {'B' if a is None else 'A'}")


def _word(value: Any) -> str:
    return ",".join(value) or "none" if isinstance(value, tuple) else str(value)


def _changed(where: str, a: Any, b: Any, a_text: str, b_text: str) -> Difference:
    return Difference(where, a, b, f"{where} is {a_text} in A and {b_text} in B")


def _bytes(where: str, a: bytes, b: bytes) -> Difference:
    a_text, b_text = printable(a), printable(b)
    if a_text and b_text and a_text != b_text:
        text = f'{where} is "{a_text}" in A and "{b_text}" in B'
    elif len(a) != len(b):
        text = f"{where} is {len(a)} bytes long in A and {len(b)} in B"
    else:
        places = [i for i in range(len(a)) if a[i] != b[i]]
        first = places[0]
        text = (
            f"{where}: {len(places)} of {len(a)} bytes differ, the first at {first:#x} "
            f"is {a[first]:02x} in A and {b[first]:02x} in B"
        )
    return Difference(where, a.hex(), b.hex(), text)
