"""The kinds of field of which a VMStateDescription is made.

A field takes its value out of a state dict and puts it there; several fields with one name would
overwrite each other, but for unused ranges, which have no value.
"""

from __future__ import annotations

import struct

from cpr.state.reader import EndOfStream, StreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.state.reader import Reader
    from cpr.state.vmstate import VMStateDescription

MAX_VARIABLE_SIZE = 64 << 10
"""Bytes of a buffer whose length is in the stream."""

MAX_ELEMENTS = 16 << 10
"""Elements of an array or a list whose number is in the stream."""

FORMATS = {
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "bool": "?",
    "timer": "q",
    "buffer": "s",
    "unused_buffer": "x",
}
"""The `struct` format of each type that QEMU's description of a stream names."""


class Field:
    """What all fields have; `uniform` says that every value takes the same number of bytes."""

    __slots__ = ("name", "uniform")

    def __init__(self, name: str, uniform: bool) -> None:
        self.name = name
        self.uniform = uniform

    def encode(self, state: dict) -> bytes:
        raise NotImplementedError

    def decode(self, reader: Reader, state: dict) -> None:
        raise NotImplementedError

    def describe(self, state: dict, name: str) -> list[dict]:
        """The entries of "fields" for this field under `name`; none for an empty array."""
        raise NotImplementedError


class FixedField(Field):
    """Integers, booleans, a buffer or an unused range of a size that is known beforehand.

    `size` is that of one element in bytes, `count` the number of elements of an array or None.
    Neighbours are packed together by their `format`, so that these have neither encode nor
    decode of their own.
    """

    __slots__ = ("count", "format", "kind", "size")

    def __init__(self, name: str, kind: str, count: int | None, size: int | None = None) -> None:
        super().__init__(name, uniform=True)
        self.kind = kind
        self.count = count
        code = FORMATS[kind]
        self.size = struct.calcsize(code) if size is None else size
        repeat = count if size is None else size
        self.format = code if repeat is None else f"{repeat}{code}"

    @property
    def single(self) -> bool:
        """Whether it is one number."""
        return self.count is None and self.kind not in ("buffer", "unused_buffer")

    def values(self, state: dict) -> list:
        """The arguments of a pack.  Refuses what struct.pack would pad, cut or misplace."""
        if self.kind == "unused_buffer":
            return []
        value = state[self.name]
        if self.kind == "buffer":
            _check_length(self.name, value, self.size)
            return [value]
        if self.count is None:
            return [value]
        _check_length(self.name, value, self.count)
        return value

    def take(self, state: dict, values: tuple, position: int) -> int:
        """Puts what begins at `position` of an unpack into `state`; returns the next position."""
        if self.kind == "unused_buffer":
            return position
        if self.count is None:
            state[self.name] = values[position]
            return position + 1
        end = position + self.count
        state[self.name] = list(values[position:end])
        return end

    def describe(self, state: dict, name: str) -> list[dict]:
        if self.count == 0:
            return []
        return [element(name, self.kind, self.size, self.count)]


class VariableBuffer(Field):
    """Bytes, as many as the field `size_name` before them says."""

    __slots__ = ("size_name",)

    def __init__(self, name: str, size_name: str) -> None:
        super().__init__(name, uniform=False)
        self.size_name = size_name

    def encode(self, state: dict) -> bytes:
        value: bytes = state[self.name]
        _check_length(self.name, value, state[self.size_name])
        return value

    def decode(self, reader: Reader, state: dict) -> None:
        size = state[self.size_name]
        state[self.name] = reader.read(min(size, MAX_VARIABLE_SIZE))
        check_most(self.name, size, MAX_VARIABLE_SIZE, "bytes")

    def describe(self, state: dict, name: str) -> list[dict]:
        return [element(name, "buffer", len(state[self.name]))]


class StructField(Field):
    """A struct, an array of `count` structs, or as many as the field `count_name` says."""

    __slots__ = ("count", "count_name", "vmsd")

    def __init__(
        self, name: str, vmsd: VMStateDescription, count: int | None, count_name: str | None
    ) -> None:
        super().__init__(name, uniform=count_name is None and vmsd.uniform)
        self.vmsd = vmsd
        self.count = count
        self.count_name = count_name

    def encode(self, state: dict) -> bytes:
        elements = self._elements(state)
        names, record = self.vmsd.names, self.vmsd.record
        if names and record is not None and len(elements) > 1:
            packer = struct.Struct(">" + record.format[1:] * len(elements))
            return packer.pack(*[each[name] for each in elements for name in names])
        return b"".join([self.vmsd.encode(each) for each in elements])

    def decode(self, reader: Reader, state: dict) -> None:
        vmsd = self.vmsd
        count = self.count if self.count_name is None else state[self.count_name]
        if self.count_name is not None:
            check_most(self.name, state[self.count_name], MAX_ELEMENTS, "elements")
        if count is None:
            state[self.name] = vmsd.decode(reader, vmsd.version_id)
        elif vmsd.record is not None and count > 0:
            state[self.name] = _decode_records(vmsd, vmsd.record, reader, count)
        else:
            state[self.name] = [vmsd.decode(reader, vmsd.version_id) for _ in range(count)]

    def describe(self, state: dict, name: str) -> list[dict]:
        elements = self._elements(state)
        if elements and self.vmsd.uniform:
            return [self._describe_one(elements[0], name, len(elements))]
        return [self._describe_one(each, name) for each in elements]

    def _elements(self, state: dict) -> list[dict]:
        value = state[self.name]
        count = self.count if self.count_name is None else state[self.count_name]
        if count is None:
            return [value]
        _check_length(self.name, value, count)
        return value

    def _describe_one(self, value: dict, name: str, array_len: int | None = None) -> dict:
        size = len(self.vmsd.encode(value))
        return element(name, "struct", size, array_len, self.vmsd.describe(value))


class ListField(Field):
    """Structs, a byte 1 before each and a byte 0 after the last, as QEMU writes its QLISTs."""

    __slots__ = ("vmsd",)

    def __init__(self, name: str, vmsd: VMStateDescription) -> None:
        super().__init__(name, uniform=False)
        self.vmsd = vmsd

    def encode(self, state: dict) -> bytes:
        return b"".join([b"\1" + self.vmsd.encode(each) for each in state[self.name]]) + b"\0"

    def decode(self, reader: Reader, state: dict) -> None:
        elements = state[self.name] = []
        while reader.read(1) != b"\0":
            check_most(self.name, len(elements) + 1, MAX_ELEMENTS, "elements")
            elements.append(self.vmsd.decode(reader, self.vmsd.version_id))

    def describe(self, state: dict, name: str) -> list[dict]:
        return [element(name, "qlist", len(self.encode(state)))]


def element(
    name: str, kind: str, size: int, array_len: int | None = None, struct: dict | None = None
) -> dict:
    """An entry of "fields", its keys in QEMU's order.

    `array_len` stands for that many elements alike, each of `size` bytes; QEMU leaves it out for
    one.  Elements of different layouts have an entry each, all with the same name.
    """
    entry: dict = {"name": name}
    if array_len is not None and array_len > 1:
        entry["array_len"] = array_len
    entry["type"] = kind
    if struct is not None:
        entry["struct"] = struct
    entry["size"] = size
    return entry


def check_most(name: str, number: int, most: int, unit: str) -> None:
    """Raises StreamError where a length or a count in a stream is more than any state has.

    A stream of some bytes and a hole must not take all memory.
    """
    if number > most:
        raise StreamError(f"field '{name}' has {number} {unit}, more than the {most} there can be")


def _check_length(name: str, value: list | bytes, wanted: int) -> None:
    if len(value) != wanted:
        raise ValueError(f"field '{name}' has {len(value)} elements, not {wanted}")


def _decode_records(
    vmsd: VMStateDescription, record: struct.Struct, reader: Reader, count: int
) -> list[dict]:
    """An array of structs that consist of fixed fields, in one read."""
    try:
        data = reader.read(record.size * count)
    except EndOfStream as end:
        raise StreamError(f"Failed to load {vmsd.name} state: {end}", end.errno) from None
    if vmsd.names:
        return [dict(zip(vmsd.names, values, strict=True)) for values in record.iter_unpack(data)]
    elements = [vmsd.take_record(values) for values in record.iter_unpack(data)]
    vmsd.decode_subsections(reader, elements[-1])
    return elements
