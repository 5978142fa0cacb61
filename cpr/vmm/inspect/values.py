"""Field values, found by the description that a stream has of itself.

A description is {"fields": [entry], "subsections": [description]}; an entry is {"name", "type",
"size"}, with "array_len" for that many elements alike of that size, and with the description of a
struct under "struct" or, for a temporary one, in the entry itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from cpr.state.vmstate import SUBSECTION
from cpr.vmm.inspect.cursor import Cursor, Damage

INTEGER = re.compile(r"(u?)int(8|16|32|64)\b.*")  # also with a check: 'int32 equal', 'int32 le'
SIGNED = frozenset({"int8", "int16", "int32", "int64", "timer"})
SUBSECTION_TYPE = "subsection"
VALUES_PER_BYTE = 8
"""No file has more structs than this, those within structs counted; empty ones could be endless."""

Scalar = int | bool | str
Content = Scalar | bytes | list[Scalar | bytes] | None


class Value(NamedTuple):
    """A field: `value` or, for a struct or a subsection, `parts`; offset and size in bytes."""

    name: str
    type: str
    offset: int
    size: int
    value: Content
    parts: list[Value] | None = None

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = self._asdict()
        if self.parts is not None:
            entry["fields"] = [part.to_json() for part in self.parts]
            del entry["value"]
        else:
            entry["value"] = plain(self.value)
        del entry["parts"]
        return entry


def decode(cursor: Cursor, description: dict) -> list[Value]:
    """Takes what `description` says from `cursor`, subsections included.

    Raises EndOfStream where the file is cut, Damage where it does not agree with the description
    or that makes no sense.
    """
    values: list[Value] = []
    for entry in _list(cursor, description, "fields"):
        values += _decode_entry(cursor, entry)
    values = _number(values)
    if "subsections" in description:
        for subsection in _list(cursor, description, "subsections"):
            values.append(_decode_subsection(cursor, subsection))
    return values


def leaves(values: list[Value], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """The fields that are no structs, each with its full name: 'state.drives[0].head'."""
    for value in values:
        name = prefix + value.name
        if value.parts is None:
            yield name, value
        else:
            yield from leaves(value.parts, f"{name}.")


def plain(value: Content) -> Any:
    """A value as JSON has it: bytes become hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def _decode_entry(cursor: Cursor, entry: dict) -> list[Value]:
    name, kind = _text(cursor, entry, "name"), _text(cursor, entry, "type")
    size = _number_of(cursor, entry, "size")
    count = _number_of(cursor, entry, "array_len") if "array_len" in entry else None
    begin = cursor.offset
    struct = entry.get("struct", entry)
    if "fields" in struct:
        names = [name] if count is None else [f"{name}[{i}]" for i in range(count)]
        return [_decode_struct(cursor, each, kind, size, struct) for each in names]
    if kind != "capability" and size * (count or 1) > cursor.left():
        total = size * (count or 1)
        raise Damage(begin, f"field '{name}' is described as {total} bytes, more than are left")
    if count is None:
        value: Content = _decode_scalar(cursor, kind, size)
    else:
        value = [_decode_scalar(cursor, kind, size) for _ in range(count)]
    return [Value(name, kind, begin, cursor.offset - begin, value)]


def _decode_struct(cursor: Cursor, name: str, kind: str, size: int, description: dict) -> Value:
    begin = cursor.offset
    cursor.values += 1
    if cursor.values > VALUES_PER_BYTE * len(cursor.data):
        raise Damage(begin, f"the description has more structs than there is room for: '{name}'")
    parts = decode(cursor, description)
    if cursor.offset - begin != size:
        raise Damage(
            begin,
            f"struct '{name}' is described as {size} bytes, "
            f"but its fields as {cursor.offset - begin}",
        )
    return Value(name, kind, begin, size, None, parts)


def _decode_scalar(cursor: Cursor, kind: str, size: int) -> Scalar | bytes:
    if kind == "capability":
        return cursor.name()
    raw = cursor.read(size)
    if kind == "bool" and size == 1:
        return raw != b"\0"
    if kind == "timer" or INTEGER.fullmatch(kind):
        return int.from_bytes(raw, "big", signed=is_signed(kind))
    return raw


def is_signed(kind: str) -> bool:
    return kind.partition(" ")[0] in SIGNED


def _decode_subsection(cursor: Cursor, description: dict) -> Value:
    name = _text(cursor, description, "vmsd_name")
    begin = cursor.offset
    raw = name.encode()
    header = bytes([SUBSECTION, len(raw) & 0xFF]) + raw
    found = cursor.read(len(header) + 4)
    if not found.startswith(header):
        raise Damage(begin, f"the description has a subsection '{name}' here, the stream has not")
    parts = decode(cursor, description)
    return Value(name, SUBSECTION_TYPE, begin, cursor.offset - begin, None, parts)


def _number(values: list[Value]) -> list[Value]:
    """Gives a number to each of several fields with one name: elements of different layouts."""
    total = Counter(value.name for value in values)
    seen: Counter[str] = Counter()
    numbered = []
    for value in values:
        if total[value.name] > 1:
            seen[value.name] += 1
            value = value._replace(name=f"{value.name}[{seen[value.name] - 1}]")
        numbered.append(value)
    return numbered


def _bad(cursor: Cursor, key: str, entry: dict) -> Damage:
    shown = str({name: each for name, each in entry.items() if not isinstance(each, list)})
    return Damage(cursor.offset, f"the description has no valid '{key}' in {shown[:100]}")


def _text(cursor: Cursor, entry: dict, key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise _bad(cursor, key, entry)
    return value


def _number_of(cursor: Cursor, entry: dict, key: str) -> int:
    """A size or a count; no count of anything is above the number of bytes in the file."""
    value = entry.get(key)
    if not isinstance(value, int) or not 0 <= value <= len(cursor.data):
        raise _bad(cursor, key, entry)
    return value


def _list(cursor: Cursor, description: dict, key: str) -> list[dict]:
    value = description.get(key)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise _bad(cursor, key, description)
    return value
