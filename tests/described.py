"""Reads streams by the JSON description at their end, as QEMU's analyze-migration does.

It shares no code with the codec that it is used to check.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from hypothesis import settings

from cpr.state.fields import FORMATS, Field, FixedField
from cpr.state.ram_section import Block
from cpr.state.reader import BytesReader
from cpr.state.stream import StreamReader
from cpr.state.vmstate import VMStateDescription, buffer, struct_, unused

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")

DATA = Path(__file__).parent / "data"
STREAMS = sorted(path.stem for path in DATA.glob("*.vmstate"))


def blocks(name: str) -> list[Block]:
    """The RAM blocks of the VM that wrote the golden stream `name`."""
    ram0 = Block("ram0", 16 << 20)
    tables, loader = "/rom@etc/acpi/tables", "/rom@etc/table-loader"
    rsdp = Block("/rom@etc/acpi/rsdp", 0x1000, 0x1000)
    if name in ("memfd1", "exec_ignore"):
        roms = [Block("pc.bios", 0x40000), Block("pc.rom", 0x20000)]
        resizable = [Block(tables, 0x20000, 0x200000), Block(loader, 0x1000, 0x10000), rsdp]
        return [ram0, *roms, *resizable]
    if name == "microvm":
        resizable = [Block(tables, 0x1000, 0x200000), Block(loader, 0x1000, 0x10000), rsdp]
        return [ram0, Block("pc.bios", 0x20000), *resizable]
    return [Block("ram0", 64 << 10)] if name == "none_pages" else []


def reader_of(stream: bytes) -> StreamReader:
    return StreamReader(io.BytesIO(stream).read)


def golden(name: str) -> bytes:
    return (DATA / f"{name}.vmstate").read_bytes()


def description_of(stream: bytes) -> dict:
    """The description: found from the end, where nothing but it holds no NUL."""
    text_begins = stream.index(b"{", stream.rindex(b"\0"))
    assert stream[text_begins - 5] == 6
    text = stream[text_begins:]
    assert int.from_bytes(stream[text_begins - 4 : text_begins], "big") == len(text)
    return json.loads(text)


def skip_body(reader: BytesReader, description: dict) -> None:
    """Takes what `description` says from `reader`; fails if a subsection is not there."""
    for entry in description["fields"]:
        for _ in range(entry.get("array_len", 1)):
            begin = reader.offset
            if entry["type"] == "struct":
                skip_body(reader, entry["struct"])
            elif entry["type"] == "capability":
                reader.read(reader.read(1)[0])
                continue
            else:
                reader.read(entry["size"])
            assert reader.offset - begin == entry["size"]
    for subsection in description.get("subsections", []):
        name = subsection["vmsd_name"].encode()
        header = bytes([5, len(name)]) + name + struct.pack(">I", subsection["version"])
        assert reader.read(len(header)) == header
        skip_body(reader, subsection)


def vmsd_of(description: dict) -> VMStateDescription:
    """A VMStateDescription with what `description` tells; of unknown types it makes buffers."""
    return VMStateDescription(
        description["vmsd_name"],
        description["version"],
        0,
        tuple(_fields_of(description["fields"])),
        tuple(vmsd_of(subsection) for subsection in description.get("subsections", [])),
    )


def understood(description: dict) -> bool:
    """Whether all the types are ones that have a constructor."""
    return all(
        understood(entry["struct"]) if "struct" in entry else entry["type"] in FORMATS
        for entry in description["fields"]
    ) and all(map(understood, description.get("subsections", [])))


def _fields_of(entries: list[dict]) -> Iterator[Field]:
    for (name, kind), group in groupby(entries, lambda entry: (entry["name"], entry["type"])):
        first, *more = group
        if more:
            assert kind == "struct"
            yield struct_(name, vmsd_of(first["struct"]), 1 + len(more))
        else:
            yield _field_of(first)


def _field_of(entry: dict) -> Field:
    name, kind, count = entry["name"], entry["type"], entry.get("array_len")
    if "struct" in entry:
        return struct_(name, vmsd_of(entry["struct"]), count)
    if kind == "unused_buffer":
        return unused(entry["size"])
    if kind in FORMATS and kind != "buffer":
        return FixedField(name, kind, count)
    return buffer(name, entry["size"])
