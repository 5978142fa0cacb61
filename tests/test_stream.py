"""stream.py: the framing against QEMU's own files, and the loader's errors word for word."""

from __future__ import annotations

import io
import json
import os
import struct

import pytest
from described import DATA, STREAMS, blocks, description_of, golden, reader_of, skip_body, vmsd_of
from hypothesis import given
from hypothesis import strategies as st
from ram_records import block_list

from cpr.state.configuration import Configuration
from cpr.state.ram_section import END as RAM_END
from cpr.state.ram_section import RamDecoder
from cpr.state.reader import BytesReader, EndOfStream, StreamError
from cpr.state.stream import END as SECTION_END
from cpr.state.stream import (
    EOF,
    FULL,
    MAGIC,
    PART,
    START,
    SWITCHOVER_START,
    VERSION,
    Section,
    StreamReader,
    StreamWriter,
)
from cpr.state.vmstate import VMStateDescription, decode, i64, u8, unused

KINDS = {START: "START", PART: "PART", SECTION_END: "END", FULL: "FULL"}
TRANSCRIBED = sorted(
    path.name.removesuffix(".sections.txt") for path in DATA.glob("*.sections.txt")
)


def load(stream: bytes, name: str) -> tuple[StreamReader, list[tuple[Section, int, dict | None]]]:
    """Loads `stream` as the VM that wrote the golden stream `name` would.

    Returns the reader, and of each section its header, its length and its state.
    """
    entries = {(d["name"], d["instance_id"]): d for d in description_of(golden(name))["devices"]}
    vmsds = {key: vmsd_of(entry) for key, entry in entries.items()}
    versions = {key: vmsd.version_id for key, vmsd in vmsds.items()} | {("ram", 0): 4}
    reader = reader_of(stream)
    reader.header()
    configuration = reader.configuration()
    expected = reader_of(golden(name))
    expected.header()
    configuration.check(
        expected.configuration().machine,
        {"x-ignore-shared": name == "exec_ignore", "mapped-ram": False},
        None,
    )
    ram = RamDecoder(blocks(name), "x-ignore-shared" in configuration.capabilities)
    loaded = []
    for section in reader.sections(versions):
        state = None
        try:
            if section.idstr == "ram":
                list(ram.pages(reader, section.version_id))
            else:
                vmsd = vmsds[section.idstr, section.instance_id]
                state = decode(vmsd, reader, section.version_id)
        except StreamError as error:
            raise section.failure(error) from None
        loaded.append((section, reader.offset - section.offset, state))
    reader.vmdescription()
    return reader, loaded


@pytest.mark.parametrize("name", TRANSCRIBED)
def test_sections_are_where_another_parser_found_them(name):
    _, loaded = load(golden(name), name)
    lines = []
    for section, length, _ in loaded:
        names = f" {section.idstr} {section.instance_id} {section.version_id}"
        lines.append(
            f"{section.offset} {KINDS[section.kind]} {section.section_id}"
            f"{'' if section.kind == SECTION_END else names} {length}"
        )
    transcript = (DATA / f"{name}.sections.txt").read_text().splitlines()
    assert lines == [line for line in transcript if line.split()[1] in KINDS.values()]


@pytest.mark.parametrize("name", STREAMS)
def test_golden_streams_are_parsed_to_their_last_byte(name):
    stream = golden(name)
    reader = reader_of(stream)
    reader.header()
    ram = RamDecoder(blocks(name), "x-ignore-shared" in reader.configuration().capabilities)
    entries = {(d["name"], d["instance_id"]): d for d in description_of(stream)["devices"]}
    for section in reader.sections(None):
        if section.idstr == "ram":
            list(ram.pages(reader, section.version_id))
        else:
            body = BytesReader(stream[reader.offset :])
            skip_body(body, entries.pop((section.idstr, section.instance_id)))
            reader.read(body.offset)
    assert entries == {}
    assert json.loads(reader.vmdescription()) == description_of(stream)
    assert (reader.offset, reader.failed, reader.warnings) == (len(stream), False, [])


@pytest.mark.parametrize("name", ["machine_none", "microvm", "memfd1"])
def test_a_golden_stream_is_written_to_the_same_bytes(name):
    stream = golden(name)
    _, loaded = load(stream, name)
    head = reader_of(stream)
    head.header()
    received = head.configuration()
    entries = {(d["name"], d["instance_id"]): d for d in description_of(stream)["devices"]}
    order = sorted(blocks(name), key=lambda block: stream.index(block.idstr.encode()))
    written = bytearray()
    writer = StreamWriter(written.extend)
    writer.header()
    writer.configuration(Configuration(received.machine))
    writer.start(1, "ram", 0, 4, block_list(order) + RAM_END)
    writer.command(SWITCHOVER_START)
    writer.end(1, RAM_END)
    for section, _, state in loaded[2:]:
        key = section.idstr, section.instance_id
        writer.device(section.section_id, *key, vmsd_of(entries[key]), state)
    writer.eof()
    sections = len(written)
    writer.vmdescription()
    assert written[:sections] == stream[:sections]
    if name == "machine_none":  # in the others are types of which vmsd_of makes buffers
        assert written == stream


def write_part(writer: StreamWriter, section_id: int, body: bytes) -> None:
    writer.open_part(section_id)
    writer.write(body)
    writer.close_section(section_id)


def test_pages_are_written_in_parts():
    stream = golden("none_pages")
    _, loaded = load(stream, "none_pages")
    written = bytearray()
    writer = StreamWriter(written.extend)
    writer.header()
    writer.configuration(Configuration("none"))
    for section, length, _ in loaded:
        body = stream[section.offset : section.offset + length]
        if section.kind == START:
            writer.start(1, "ram", 0, 4, body[17:])
        elif section.kind == PART:
            write_part(writer, 1, body[5:])
        elif section.kind == SECTION_END:
            writer.command(SWITCHOVER_START)
            writer.end(1, body[5:])
    assert stream.startswith(written)
    assert [section.kind for section, _, _ in loaded].count(PART) == 1


NONE, PC = golden("machine_none"), golden("memfd1")


def patched(stream: bytes, offset: int, replacement: bytes) -> bytes:
    return stream[:offset] + replacement + stream[offset + len(replacement) :]


def subsection(name: str, version: int, body: bytes) -> bytes:
    """machine_none with a subsection in its configuration."""
    raw = name.encode()
    header = bytes([5, len(raw)]) + raw + struct.pack(">I", version)
    return NONE[:17] + header + body + NONE[17:]


def with_command(command: int, payload: bytes = b"") -> bytes:
    return NONE[:55] + struct.pack(">BHH", 8, command, len(payload)) + payload + NONE[60:]


CONFIGURATION_CUT = "Invalid argument: Failed to load configuration state: stream error: -5"
NO_SECTION = (
    "Input/output error: Failed to load section ID: stream error: -5: "
    "Channel error: Input/output error"
)
NO_ID = "Invalid argument: Unable to read ID string for section {}"
NO_VERSION = "Input/output error: Failed to read instance/version ID: -5"
DEVICE = "Invalid argument: error while loading state for instance 0x0 of device '{}': "
FOOTER = "Invalid argument: Section footer error, section_id: {}"
NO_FOOTER = "check_section_footer: Read section footer failed: -5"
MISMATCH = "Mismatched section id in footer for {} - read {} expected {}"
RAM_CUT = (
    "Input/output error: error while loading state for instance 0x0 of device 'ram': "
    "Failed to load vmstate version_id: 4, ret: -5"
)
END_CUT = "Input/output error: Failed to load vmstate version_id: 4, ret: -5"
ADDRESS = "Getting RAM address failed"
COMMAND_CUT = "Input/output error: Failed to load VM process command: stream error: -5"
SETUP = (
    "Make sure that your current VM setup matches your saved VM setup, "
    "including any hotplugged devices"
)
LOADING = "Invalid argument: Loading VM subsection '{0}' in 'configuration' failed: "
CAPABILITIES = "configuration/capabilities"

# What QEMU 11.1.3 prints after "load of migration failed: ", and before it on lines of their own.
FAILURES = {
    "empty": (b"", "Invalid argument: Not a migration stream, magic: 0 != 5145564d", []),
    "magic": (b"XXXX", "Invalid argument: Not a migration stream, magic: 58585858 != 5145564d", []),
    "magic cut": (
        b"QE",
        "Invalid argument: Not a migration stream, magic: 51450000 != 5145564d",
        [],
    ),
    "version 2": (
        patched(NONE, 4, b"\0\0\0\2"),
        "Operation not supported: SaveVM v2 format is obsolete and no longer supported",
        [],
    ),
    "version 4": (
        patched(NONE, 4, b"\0\0\0\4"),
        "Operation not supported: Unsupported migration stream version, file version 4 != 3",
        [],
    ),
    "cut 4": (
        NONE[:4],
        "Operation not supported: Unsupported migration stream version, file version 0 != 3",
        [],
    ),
    "cut 8": (NONE[:8], "Invalid argument: Configuration section missing, 0 != 7", []),
    "no configuration": (
        NONE[:8] + NONE[17:],
        "Invalid argument: Configuration section missing, 1 != 7",
        [],
    ),
    "cut 9": (NONE[:9], CONFIGURATION_CUT, []),
    "cut 16": (NONE[:16], CONFIGURATION_CUT, []),
    "huge machine name": (patched(NONE, 9, b"\xff" * 4), CONFIGURATION_CUT, []),
    "machine": (
        NONE[:9] + b"\0\0\0\5nonex" + NONE[17:],
        "Invalid argument: post load hook failed for: configuration, version_id: 1, "
        "minimum_version: 0: Machine type received is 'nonex' and local is 'none'",
        [],
    ),
    "capability": (
        subsection(CAPABILITIES, 1, b"\0\0\0\1\x0fx-ignore-shared"),
        "Invalid argument: post load hook failed for: configuration, version_id: 1, "
        "minimum_version: 0: Failed to validate capabilities",
        ["Capability x-ignore-shared is off, but received capability is on"],
    ),
    "unknown capability": (
        subsection(CAPABILITIES, 1, b"\0\0\0\1\5bogus"),
        LOADING.format(CAPABILITIES) + "Received unknown capability bogus",
        [],
    ),
    "capabilities too new": (
        subsection(CAPABILITIES, 2, b"\0\0\0\0"),
        LOADING.format(CAPABILITIES)
        + "configuration/capabilities: incoming version_id 2 is too new for local version_id 1",
        [],
    ),
    "capabilities too old": (
        subsection(CAPABILITIES, 0, b"\0\0\0\0"),
        LOADING.format(CAPABILITIES)
        + "configuration/capabilities: incoming version_id 0 is too old "
        "for local minimum version_id 1",
        [],
    ),
    "subsection": (
        subsection("configuration/bogus", 1, b""),
        "Invalid argument: VM subsection 'configuration/bogus' in 'configuration' does not exist",
        [],
    ),
    "subsection of another": (
        subsection("cxxfiguration/bogus", 1, b""),
        "Invalid argument: Unknown section type 5",
        [],
    ),
    "cut 17": (NONE[:17], NO_SECTION, []),
    "cut 18": (NONE[:18], NO_ID.format(0), []),
    "cut 22": (NONE[:22], NO_ID.format(1), []),
    "cut 25": (NONE[:25], NO_ID.format(1), []),
    "no idstr": (patched(NONE, 22, b"\0"), NO_ID.format(1), []),
    "cut 29": (NONE[:29], NO_VERSION, []),
    "cut 33": (NONE[:33], NO_VERSION, []),
    "cut 40": (NONE[:40], RAM_CUT, [ADDRESS]),
    "cut 50": (NONE[:50], FOOTER.format(1), [NO_FOOTER]),
    "cut 54": (NONE[:54], FOOTER.format(1), [MISMATCH.format("ram", "0x0", "0x1")]),
    "cut 55": (NONE[:55], NO_SECTION, []),
    "cut 56": (NONE[:56], COMMAND_CUT, []),
    "cut 58": (NONE[:58], COMMAND_CUT, []),
    "cut 60": (NONE[:60], NO_SECTION, []),
    "cut 61": (NONE[:61], "Input/output error: Failed to read section ID: -5", []),
    "cut 65": (NONE[:65], END_CUT, [ADDRESS]),
    "cut 73": (NONE[:73], FOOTER.format(1), [NO_FOOTER]),
    "cut 74": (NONE[:74], FOOTER.format(1), [MISMATCH.format("ram", "0x0", "0x1")]),
    "cut 83": (NONE[:83], NO_ID.format(0), []),
    "cut 97": (
        NONE[:97],
        DEVICE.format("timer") + "Failed to load timer state: stream error: -5",
        [],
    ),
    "cut 121": (NONE[:121], FOOTER.format(0), [NO_FOOTER]),
    "cut in a footer of id 0": (NONE[:122], NO_SECTION, []),
    "cut 259": (NONE[:259], FOOTER.format(3), [MISMATCH.format("globalstate", "0x0", "0x3")]),
    "cut 260": (NONE[:260], NO_SECTION, []),
    "ram version": (
        patched(NONE, 30, b"\0\0\0\5"),
        "Invalid argument: unsupported version 5 for 'ram' v4",
        [],
    ),
    "ram old": (
        patched(NONE, 30, b"\0\0\0\3"),
        DEVICE.format("ram") + "Failed to load vmstate version_id: 3, ret: -22",
        [],
    ),
    "unknown END": (patched(NONE, 61, b"\0\0\0\x63"), "Invalid argument: Unknown section 99", []),
    "command 99": (with_command(99), "Invalid argument: MIG_CMD 0x63 unknown (len 0x0)", []),
    "command 0": (with_command(0, b"ab"), "Invalid argument: MIG_CMD 0x0 unknown (len 0x2)", []),
    "command length": (
        with_command(SWITCHOVER_START, b"abcd"),
        "Numerical result out of range: "
        "SWITCHOVER_START received with bad length - expecting 0, got 4",
        [],
    ),
    "version above": (
        patched(NONE, 93, b"\0\0\0\3"),
        "Invalid argument: unsupported version 3 for 'timer' v2",
        [],
    ),
    "instance": (
        patched(NONE, 143, b"\0\0\0\1"),
        f"Invalid argument: Unknown section or instance 'globalstate' 1. {SETUP}",
        [],
    ),
    "pc: version": (
        patched(PC, 232, b"\0\0\0\x09"),
        "Invalid argument: unsupported version 9 for 'apic' v3",
        [],
    ),
    "pc: unknown device": (
        PC.replace(b"\x0acpu_common", b"\x0acpu_commox"),
        f"Invalid argument: Unknown section or instance 'cpu_commox' 0. {SETUP}",
        [],
    ),
    "pc: footer id": (
        patched(PC, 418, b"\0\0\0\x63"),
        FOOTER.format(6),
        [MISMATCH.format("apic", "0x63", "0x6")],
    ),
    "pc: footer byte": (
        patched(PC, 417, b"\0"),
        FOOTER.format(6),
        ["Missing section footer for apic"],
    ),
    "pc: section type": (
        patched(PC, 422, b"\x55"),
        "Invalid argument: Unknown section type 85",
        [],
    ),
    "pc: cut 400": (
        PC[:400],
        DEVICE.format("apic") + "Failed to load apic state: stream error: -5",
        [],
    ),
    "pc: cut 7416": (
        PC[:7416],
        DEVICE.format("i8254") + "Failed to load pit channel state: stream error: -5",
        [],
    ),
    "pc: unknown subsection": (
        PC.replace(b"\x14cpu/poll_control_msr", b"\x14cpu/poll_control_msx"),
        DEVICE.format("cpu") + "VM subsection 'cpu/poll_control_msx' in 'cpu' does not exist",
        [],
    ),
    "pc: cut 60": (
        PC[:60],
        DEVICE.format("ram") + "Failed to load vmstate version_id: 4, ret: -22",
        ["Size mismatch: ram0: 0x0 != 0x1000000: Invalid argument"],
    ),
    "pc: block name": (
        PC.replace(b"\4ram0", b"\4ramX"),
        DEVICE.format("ram") + "Failed to load vmstate version_id: 4, ret: -22",
        ['Unknown ramblock "ramX", cannot accept migration'],
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_corrupt_stream_fails_with_the_text_of_qemu(case):
    stream, text, lines = FAILURES[case]
    with pytest.raises(StreamError) as caught:
        load(stream, "memfd1" if case.startswith("pc: ") else "machine_none")
    error = caught.value
    assert f"{os.strerror(error.errno)}: {error}" == text
    assert list(error.stderr) == lines


LOADED = {
    "whole": (NONE, []),
    "no capabilities": (subsection(CAPABILITIES, 1, b"\0\0\0\0"), []),
    "no switchover": (NONE[:55] + NONE[60:], []),
    "two switchovers": (NONE[:60] + NONE[55:], []),
    "PART for END": (patched(NONE, 60, b"\2"), []),
    "two STARTs": (NONE[:55] + NONE[17:55] + NONE[55:], []),
    "bytes after it": (NONE + b"\0\0\0\0", []),
    "no description": (NONE[:261], ["Expected vmdescription section, but got 0"]),
    "early EOF": (NONE[:60] + b"\0", ["Expected vmdescription section, but got 0"]),
    "another section": (patched(NONE, 261, b"\7"), ["Expected vmdescription section, but got 7"]),
    "cut after its kind": (NONE[:262], []),
    "cut in its length": (NONE[:265], []),
    "cut in its text": (NONE[:500], []),
    "short text": (patched(NONE, 262, b"\0\0\0\5"), []),
}


@pytest.mark.parametrize(("stream", "warnings"), LOADED.values(), ids=LOADED)
def test_flaws_that_qemu_lets_pass(stream, warnings):
    reader, _ = load(stream, "machine_none")
    assert reader.warnings == warnings


def test_a_device_of_an_older_version_is_loaded():
    vmsd = VMStateDescription("timer", 2, 1, (i64("a"), unused(8), i64("b")))
    written = bytearray()
    writer = StreamWriter(written.extend)
    old = VMStateDescription("timer", 1, 1, vmsd.fields)
    writer.device(5, "timer", 0, old, {"a": 1, "b": 2})
    writer.eof()
    reader = reader_of(bytes(written))
    states = [decode(vmsd, reader, s.version_id) for s in reader.sections({("timer", 0): 2})]
    assert states == [{"a": 1, "b": 2}]


def test_the_description_holds_no_nul_and_nothing_follows_it():
    written = bytearray()
    writer = StreamWriter(written.extend)
    writer.header()
    writer.configuration(Configuration("pc"))
    writer.device(2, "dé\0v", 7, VMStateDescription("d", 1, 1, (u8("x"),)), {"x": 1})
    writer.eof()
    writer.vmdescription("it")
    description = description_of(bytes(written))
    assert list(description) == ["configuration", "page_size", "devices", "program"]
    assert description["program"] == "it"
    assert description["page_size"] == 4096
    assert description["devices"] == [
        {
            "name": "dé\0v",
            "instance_id": 7,
            "vmsd_name": "d",
            "version": 1,
            "fields": [{"name": "x", "type": "uint8", "size": 1}],
        }
    ]


def test_reads_beyond_the_end_are_zeros_or_an_error():
    reader = reader_of(b"\1\2\3")
    assert reader.peek(9) == b"\1\2\3"
    assert reader.integer(2) == 0x0102
    assert not reader.failed
    assert reader.integer(4) == 0x03000000
    assert (reader.failed, reader.offset, reader.peek(1)) == (True, 3, b"")
    with pytest.raises(EndOfStream, match="stream error: -5"):
        reader.read(1)


class Dribble(io.BytesIO):
    """Gives what is asked for in pieces of `size` bytes, as a socket may."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        return super().read(min(size, self.size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 4096])
def test_the_size_of_the_pieces_does_not_matter(size):
    reader = StreamReader(Dribble(NONE, size).read)
    reader.header()
    assert reader.configuration().machine == "none"
    sections = []
    bodies = {"ram": 16, "timer": 24, "globalstate": 104}
    for section in reader.sections(None):
        sections.append(section.offset)
        reader.read(8 if section.kind == SECTION_END else bodies[section.idstr])
    assert sections == [17, 60, 78, 126]
    assert reader.vmdescription() == NONE[266:]


def test_errors_of_the_channel_pass_through():
    def read(size: int) -> bytes:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        StreamReader(read).header()


def loads_or_raises_one_error(stream: bytes) -> None:
    try:
        load(stream, "machine_none")
    except StreamError as error:
        assert str(error)
        assert os.strerror(error.errno)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_load_or_raise_one_error(data):
    loads_or_raises_one_error(data)
    loads_or_raises_one_error(struct.pack(">II", MAGIC, VERSION) + data)
    loads_or_raises_one_error(NONE[:17] + data)


@given(st.integers(0, 260), st.binary(min_size=1, max_size=8), st.integers(0, 300))
def test_a_damaged_stream_loads_or_raises_one_error(offset, damage, cut):
    loads_or_raises_one_error(patched(NONE, offset, damage))
    loads_or_raises_one_error(patched(NONE, offset, damage)[:cut])


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=50).filter(
    lambda name: len(name.encode()) < 256
)


@given(
    names,
    st.lists(
        st.tuples(
            st.sampled_from([START, PART, SECTION_END]),
            st.integers(0, 2**32 - 1),
            names,
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
            st.binary(max_size=20),
        )
    ),
)
def test_any_sections_round_trip(machine, sections):
    written = bytearray()
    writer = StreamWriter(written.extend)
    writer.header()
    writer.configuration(Configuration(machine))
    expected, started = [], {}
    for kind, section_id, idstr, instance_id, version_id, body in sections:
        if kind == START:
            started[section_id] = (idstr, instance_id, version_id)
            writer.start(section_id, idstr, instance_id, version_id, body)
        elif section_id not in started:
            continue
        elif kind == PART:
            write_part(writer, section_id, body)
        else:
            writer.end(section_id, body)
        expected.append((kind, section_id, *started[section_id], body))
    writer.eof()
    reader = reader_of(bytes(written))
    reader.header()
    assert reader.configuration().machine == machine
    found: list[tuple] = []
    for section in reader.sections(None):
        body = reader.read(len(expected[len(found)][5]))
        found.append(
            (
                section.kind,
                section.section_id,
                section.idstr,
                section.instance_id,
                section.version_id,
                body,
            )
        )
    assert found == expected
    assert written[-1] == EOF
