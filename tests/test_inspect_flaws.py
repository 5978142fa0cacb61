"""The verb `inspect` on files that are cut or damaged: one clear message, and where."""

from __future__ import annotations

import json
import tempfile

import pytest
from described import DATA, STREAMS, description_of, golden
from hypothesis import given
from hypothesis import strategies as st
from inspecting import BLOCKS, FILES, as_json, inspected, mapped_ram, run, stream_with_ram
from ram_records import PageEncoder, block_list

from cpr.constants import PAGE_SIZE
from cpr.state.cpr_state import CprState

SMALL = [name for name in FILES if (DATA / name).stat().st_size < 2000]
NONE = golden("machine_none")
PC = golden("memfd1")
MEMFD1 = (DATA / "memfd1.cprstate.bin").read_bytes()
JSON = NONE.index(b'{"configuration"')


@pytest.mark.parametrize("name", SMALL)
def test_every_truncation_has_one_flaw_at_its_end(name):
    data = (DATA / name).read_bytes()
    for length in range(len(data)):
        (flaw,) = inspected(data[:length]).flaws
        assert flaw.offset == length
        assert flaw.text


@given(st.sampled_from(FILES), st.data())
def test_a_truncated_golden_gives_one_message_with_the_offset(name, draw):
    data = (DATA / name).read_bytes()
    length = draw.draw(st.integers(0, len(data) - 1))
    with tempfile.NamedTemporaryFile() as cut:
        cut.write(data[:length])
        cut.flush()
        status, _, err = run("--fields", cut.name)
        assert status == 1
        assert err.startswith(f"cpr-vmm: {cut.name}: offset {length} ({length:#x}): ")
        assert err.count("\n") == 1
        assert run("--diff", cut.name, DATA / name)[0] == 2


@given(st.sampled_from(FILES), st.integers(0), st.binary(min_size=1, max_size=4), st.booleans())
def test_a_damaged_golden_is_shown_without_an_exception(name, offset, damage, insert):
    data = bytearray((DATA / name).read_bytes())
    offset %= len(data)
    data[offset : offset if insert else offset + len(damage)] = damage
    with tempfile.NamedTemporaryFile() as bad:
        bad.write(data)
        bad.flush()
        status, out, err = run("--fields", bad.name)
        assert status == (1 if err else 0)
        assert out
        assert json.loads(run("--fields", "--json", bad.name)[1])
        assert run("--diff", bad.name, DATA / name)[0] in (0, 1, 2)


@given(st.binary(max_size=300), st.sampled_from([b"", MEMFD1[:8], NONE[:8], NONE[:17], NONE[:60]]))
def test_arbitrary_bytes_have_a_flaw_inside_the_file(data, head):
    for flaw in inspected(head + data).flaws:
        assert 0 <= flaw.offset <= len(head + data)


@pytest.mark.parametrize("name", STREAMS)
def test_sections_are_found_without_the_description(name):
    data = golden(name)
    whole = inspected(data)
    cut = inspected(data[: whole.items[-1].offset])
    assert [(i.offset, i.size, i.key) for i in cut.items] == [
        (i.offset, i.size, i.key) for i in whole.items[:-1]
    ]
    assert all(i.fields is None for i in cut.items if i.kind == "FULL")


def patched(data: bytes, offset: int, patch: bytes) -> bytes:
    return data[:offset] + patch + data[offset + len(patch) :]


BROKEN = {
    "empty": (b"", 0, "the file is empty"),
    "magic": (
        b"XXXX1234",
        0,
        "magic 58585858: neither CprState ('QCPR') nor migration stream ('QEVM')",
    ),
    "magic cut": (b"QE", 2, "the file ends inside the magic that begins at offset 0"),
    "state version": (
        patched(MEMFD1, 4, b"\0\0\0\2"),
        4,
        "Unsupported migration stream version 2",
    ),
    "state cut in an entry": (
        MEMFD1[:60],
        60,
        "the file ends 6 or more bytes too early, inside the entry of a descriptor that begins "
        "at offset 40 (0x28)",
    ),
    "no subsection": (
        MEMFD1[:169],
        169,
        "the file ends here, without 'CprState/vfio devices'",
    ),
    "unknown subsection": (
        patched(MEMFD1, 171, b"CprState/sfio"),
        169,
        "VM subsection 'CprState/sfio devices' in 'CprState' does not exist",
    ),
    "state tail": (MEMFD1 + b"tail", 197, "4 bytes after the end of the state"),
    "negative fd": (
        CprState([("ram0", 0, 7)], []).encode().replace(b"\0\0\0\7", b"\xff\xff\xff\xff"),
        8,
        "'ram0' id 0 has the negative descriptor -1",
    ),
    "no NUL": (
        CprState([("ram0", 0, 7)], []).encode().replace(b"ram0\0", b"ram01"),
        8,
        "the name 'ram01' has no NUL at its end",
    ),
    "two of one name": (
        CprState([("a", 0, 7), ("a", 0, 8)], []).encode(),
        23,
        "a second entry 'a' id 0: only the first is used",
    ),
    "stream version": (
        patched(NONE, 4, b"\0\0\0\4"),
        4,
        "Unsupported migration stream version, file version 4 != 3",
    ),
    "no configuration": (NONE[:8] + NONE[17:], 8, "Configuration section missing, 1 != 7"),
    "section type": (patched(NONE, 60, b"\x55"), 60, "Unknown section type 85"),
    "unknown section": (patched(NONE, 61, b"\0\0\0\x63"), 61, "Unknown section 99"),
    "no idstr": (patched(NONE, 22, b"\0"), 22, "Unable to read ID string for section 1"),
    "command": (patched(NONE, 56, b"\0\x63"), 55, "MIG_CMD 0x63 unknown (len 0x0)"),
    "footer": (patched(PC, 417, b"\0"), 417, "Missing section footer for apic"),
    "footer id": (
        patched(PC, 418, b"\0\0\0\x63"),
        418,
        "Mismatched section id in footer for apic - read 0x63 expected 0x6",
    ),
    "section version": (
        patched(PC, 232, b"\0\0\0\x09"),
        232,
        "section 6 'apic' has version 9, but is described as version 3",
    ),
    "subsection": (
        PC.replace(b"\x14cpu/poll_control_msr", b"\x14cpu/poll_control_msx"),
        PC.index(b"\x05\x14cpu/poll_control_msr"),
        "the description has a subsection 'cpu/poll_control_msr' here, the stream has not",
    ),
    "ram version": (patched(NONE, 30, b"\0\0\0\5"), 34, "version 5 of 'ram' is not 4"),
    "ram flags": (
        patched(NONE, 34, b"\0\0\0\0\0\0\1\0"),
        34,
        "Unknown combination of migration flags: 0x100",
    ),
    "page without a block": (
        patched(NONE, 34, b"\0\0\0\0\0\0\0\x28"),
        34,
        "Ack, bad migration stream!",
    ),
    "block lengths": (
        stream_with_ram(b"\0\0\0\0\0\0\x10\4" + b"\4ram0" + b"\0\0\0\0\0\0\x20\0"),
        40,
        "RAM block 'ram0' is 8192 bytes long, but only 4096 are left of the total",
    ),
    "page of no block": (
        stream_with_ram(block_list(BLOCKS) + PageEncoder().zero_page("ramX", 0)),
        65,
        "Can't find block ramX",
    ),
    "page outside": (
        stream_with_ram(block_list(BLOCKS) + PageEncoder().zero_page("rom", PAGE_SIZE)),
        65,
        "Illegal RAM offset 1000",
    ),
    "cut in mapped pages": (
        mapped_ram([b"a"])[: (1 << 20) + 100],
        (1 << 20) + 100,
        "the file ends 3996 or more bytes too early, inside section 1 'ram' that begins at "
        "offset 62 (0x3e)",
    ),
    "cut in a device": (
        PC[:400],
        400,
        "the file ends 5 or more bytes too early, inside section 6 'apic' that begins at "
        "offset 218 (0xda)",
    ),
    "no description": (
        NONE[:261],
        261,
        "the file ends here, without a description of the fields",
    ),
    "no JSON": (
        patched(NONE, JSON, b"["),
        JSON,
        "the description is not JSON: Expecting ',' delimiter: line 1 column 17 (char 16)",
    ),
    "stream tail": (NONE + b"tail", len(NONE), "4 bytes after the end of the stream"),
}


@pytest.mark.parametrize(("data", "offset", "text"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_and_where(tmp_path, data, offset, text):
    path = tmp_path / "file"
    path.write_bytes(data)
    status, _, err = run(path)
    assert (status, err) == (1, f"cpr-vmm: {path}: offset {offset} ({offset:#x}): {text}\n")
    assert as_json(path)["flaws"] == [{"offset": offset, "text": text}]


def described_as(change: object) -> bytes:
    """The smallest golden stream with another description of its device 'timer'."""
    description = description_of(NONE)
    description["devices"][0].update(change)
    text = json.dumps(description).encode()
    return NONE[: JSON - 4] + len(text).to_bytes(4, "big") + text


def nested(depth: int) -> dict:
    entry: dict = {"name": "x", "type": "uint8", "size": 1}
    for _ in range(depth):
        entry = {"name": "s", "type": "struct", "size": 1, "struct": {"fields": [entry]}}
    return entry


FIELD = {"name": "x", "type": "uint8", "size": 1}
DESCRIPTIONS = {
    "no fields": ({"fields": None}, "no valid 'fields'"),
    "no name": ({"fields": [{"type": "uint8", "size": 1}]}, "no valid 'name'"),
    "size": ({"fields": [{**FIELD, "size": -1}]}, "no valid 'size'"),
    "count": ({"fields": [{**FIELD, "array_len": 1 << 60}]}, "no valid 'array_len'"),
    "too long": (
        {"fields": [{**FIELD, "size": 8, "array_len": 200}]},
        "field 'x' is described as 1600 bytes, more than are left",
    ),
    "too short": ({"fields": [FIELD]}, "Missing section footer for timer"),
    "struct": (
        {"fields": [{**nested(1), "size": 2}]},
        "struct 's' is described as 2 bytes, but its fields as 1",
    ),
    "nested": ({"fields": [nested(280)]}, "nested too deeply"),
}


@pytest.mark.parametrize(("change", "text"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_description_that_is_wrong(change, text):
    (flaw,) = inspected(described_as(change)).flaws
    assert text in flaw.text


def test_names_are_printed_without_control_characters(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CprState([("\x1b[2J\n", 0, 7)], []).encode())
    status, out, _ = run(path)
    assert status == 0
    assert "\\x1b[2J\\n" in out
    assert "\x1b" not in out
