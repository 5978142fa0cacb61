"""VMState: device state described field by field, as QEMU's migration stream holds it.

    body        = field* subsection*
    field       = big-endian integers, one byte per boolean, the bytes of a buffer, the bodies of
                  the structs, or zeros for an unused range
    subsection  = u8 5, u8 length, name, u32 version, body

State is a dict from field name to value: an int or a bool, a list of them for an array, bytes for
a buffer, a dict or a list of dicts for structs.  A subsection's state is a dict under the
subsection's full name; the subsection is in the stream iff that key is in the dict.
"""

from __future__ import annotations

import struct
from errno import ENOENT

from cpr.state.fields import Field, FixedField, ListField, StructField, VariableBuffer
from cpr.state.reader import EndOfStream, StreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.state.reader import Reader

SUBSECTION = 5  # QEMU_VM_SUBSECTION


class VMStateDescription:
    """The fields and subsections of a section, a subsection or a struct.

    The names of the subsections must begin with this one's; by convention they are 'name/part'.
    `uniform`: every state takes the same bytes, so that one description fits all the elements of
    an array.  `record` packs the whole body where it has fixed fields only, else it is None.
    """

    __slots__ = (
        "fields",
        "groups",
        "minimum_version_id",
        "name",
        "names",
        "record",
        "subsections",
        "uniform",
        "version_id",
    )

    def __init__(
        self,
        name: str,
        version_id: int,
        minimum_version_id: int,
        fields: tuple[Field, ...],
        subsections: tuple[VMStateDescription, ...] = (),
    ) -> None:
        self.name = name
        self.version_id = version_id
        self.minimum_version_id = minimum_version_id
        self.fields = fields
        self.subsections = subsections
        for subsection in subsections:
            if not subsection.name.startswith(name):
                raise ValueError(f"'{subsection.name}' is no name for a subsection of '{name}'")
        self.groups = _group(fields)
        self.uniform: bool = not subsections and all(field.uniform for field in fields)
        self.record = self.groups[0][0] if len(self.groups) == 1 and not subsections else None
        # Of a record whose fields are one number each: an array of it is one pack.
        single = self.record is not None and all(field.single for field in self.groups[0][1])
        self.names = tuple(field.name for field in fields) if single else ()

    def encode(self, state: dict) -> bytes:
        """The body for `state`.

        Raises KeyError for a missing field, ValueError for an array or a buffer of another
        length, struct.error for an integer out of range: the program's errors, not the user's.
        """
        pieces = []
        for packer, fields in self.groups:
            if packer is None:
                pieces.append(fields[0].encode(state))
            else:
                pieces.append(packer.pack(*[v for field in fields for v in field.values(state)]))
        for subsection in self.subsections:
            if subsection.name in state:
                name = subsection.name.encode()
                pieces.append(bytes([SUBSECTION, len(name)]) + name)
                pieces.append(struct.pack(">I", subsection.version_id))
                pieces.append(subsection.encode(state[subsection.name]))
        return b"".join(pieces)

    def decode(self, reader: Reader, version_id: int) -> dict:
        """Takes a body of version `version_id` from `reader` and returns the state.

        Raises StreamError with QEMU's text where the version is not supported, the stream ends
        too early, or there is a subsection that this description does not have.
        """
        self._check_version(version_id)
        state: dict = {}
        try:
            for packer, fields in self.groups:
                if packer is None:
                    fields[0].decode(reader, state)
                else:
                    _take(fields, packer.unpack(reader.read(packer.size)), state)
        except EndOfStream as end:
            raise StreamError(f"Failed to load {self.name} state: {end}", end.errno) from None
        self.decode_subsections(reader, state)
        return state

    def describe(self, state: dict) -> dict:
        """What the description at the end of a stream says of the body for `state`.

        {"vmsd_name", "version", "fields": [entry], "subsections": [the same again]}, the last
        only if there are any; entry is {"name", "array_len", "type", "struct", "size"} with the
        size of one element.  Of fields with one name each gets its number: 'unused[1]'.
        """
        names = [field.name for field in self.fields]
        entries: list[dict] = []
        for position, field in enumerate(self.fields):
            name = field.name
            if names.count(name) > 1:
                name = f"{name}[{names[:position].count(name)}]"
            entries += field.describe(state, name)
        description = {"vmsd_name": self.name, "version": self.version_id, "fields": entries}
        present = [each for each in self.subsections if each.name in state]
        if present:
            description["subsections"] = [each.describe(state[each.name]) for each in present]
        return description

    def take_record(self, values: tuple) -> dict:
        """The state from the values that `record` unpacked."""
        state: dict = {}
        _take(self.groups[0][1], values, state)
        return state

    def decode_subsections(self, reader: Reader, state: dict) -> None:
        """Takes subsections as long as what follows is the header of one under this name.

        A header that is cut off is left alone: it is for the caller to find that it is none of
        what may come next.  A version that is cut off reads as if zeros came after it.
        """
        prefix = self.name.encode()
        while reader.peek(1) == bytes([SUBSECTION]):
            length = (reader.peek(2)[1:] or b"\0")[0]
            header = reader.peek(2 + length + 4)
            raw_name = header[2 : 2 + length]
            if length <= len(prefix) or len(raw_name) < length or not raw_name.startswith(prefix):
                return
            name = raw_name.decode(errors="replace")
            subsection = next((each for each in self.subsections if each.name == name), None)
            if subsection is None:
                text = f"VM subsection '{name}' in '{self.name}' does not exist"
                raise StreamError(text, ENOENT)
            reader.read(len(header))
            version = int.from_bytes(header[2 + length :].ljust(4, b"\0"), "big")
            try:
                state[name] = subsection.decode(reader, version)
            except StreamError as error:
                text = f"Loading VM subsection '{name}' in '{self.name}' failed: {error}"
                raise StreamError(text, error.errno, error.stderr) from None

    def _check_version(self, version_id: int) -> None:
        if version_id > self.version_id:
            raise StreamError(
                f"{self.name}: incoming version_id {version_id} is too new "
                f"for local version_id {self.version_id}"
            )
        if version_id < self.minimum_version_id:
            raise StreamError(
                f"{self.name}: incoming version_id {version_id} is too old "
                f"for local minimum version_id {self.minimum_version_id}"
            )


encode = VMStateDescription.encode
decode = VMStateDescription.decode
describe = VMStateDescription.describe


def u8(name: str, num: int | None = None) -> Field:
    """An integer, or an array of `num` of them; as all the others up to i64."""
    return FixedField(name, "uint8", num)


def u16(name: str, num: int | None = None) -> Field:
    return FixedField(name, "uint16", num)


def u32(name: str, num: int | None = None) -> Field:
    return FixedField(name, "uint32", num)


def u64(name: str, num: int | None = None) -> Field:
    return FixedField(name, "uint64", num)


def i32(name: str, num: int | None = None) -> Field:
    return FixedField(name, "int32", num)


def i64(name: str, num: int | None = None) -> Field:
    return FixedField(name, "int64", num)


def boolean(name: str, num: int | None = None) -> Field:
    """One byte each; any byte but 0 is true."""
    return FixedField(name, "bool", num)


def timer(name: str) -> Field:
    """When a timer expires, in ns of the virtual clock; -1 while it is not armed."""
    return FixedField(name, "timer", None)


def buffer(name: str, size: int) -> Field:
    """`size` bytes."""
    return FixedField(name, "buffer", None, size)


def vbuffer(name: str, size_field_name: str) -> Field:
    """As many bytes as the unsigned field `size_field_name`, which comes before, says."""
    return VariableBuffer(name, size_field_name)


def unused(size: int) -> Field:
    """`size` bytes that nobody uses any more: written as zeros, ignored, and in no dict."""
    return FixedField("unused", "unused_buffer", None, size)


def struct_(name: str, vmsd: VMStateDescription, num: int | None = None) -> Field:
    """A struct, or an array of `num` structs, each with the fields of `vmsd`."""
    return StructField(name, vmsd, num, None)


def varray(name: str, vmsd: VMStateDescription, count_field_name: str) -> Field:
    """As many structs as the unsigned field `count_field_name`, which comes before, says."""
    return StructField(name, vmsd, None, count_field_name)


def qlist(name: str, vmsd: VMStateDescription) -> Field:
    """Any number of structs, with no count."""
    return ListField(name, vmsd)


def _group(fields: tuple[Field, ...]) -> list[tuple[struct.Struct | None, list[Any]]]:
    """Puts neighbouring fixed fields together, so that one call packs them all."""
    groups: list[tuple[str | None, list[Any]]] = []
    for field in fields:
        if not isinstance(field, FixedField):
            groups.append((None, [field]))
        elif groups and groups[-1][0] is not None:
            groups[-1] = (groups[-1][0] + field.format, groups[-1][1] + [field])
        else:
            groups.append((field.format, [field]))
    return [(None if form is None else struct.Struct(f">{form}"), each) for form, each in groups]


def _take(fields: list[FixedField], values: tuple, state: dict) -> None:
    position = 0
    for field in fields:
        position = field.take(state, values, position)
