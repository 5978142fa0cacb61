"""The verb `inspect`: goldens, damaged files, live processes, and two files compared."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import ROOT
from described import DATA, STREAMS, description_of, golden, understood, vmsd_of
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for

from cpr.state.configuration import Configuration
from cpr.state.cpr_state import STATE_NAME, CprState, VfioDevice
from cpr.state.ram_section import END as RAM_END
from cpr.state.ram_section import PAGE_SIZE, Block, PageEncoder, block_list
from cpr.state.reader import BytesReader
from cpr.state.stream import SWITCHOVER_START, StreamWriter
from cpr.state.vmstate import VMStateDescription, buffer, decode, i32, u8
from cpr.vmm.__main__ import main
from cpr.vmm.inspect import source
from cpr.vmm.inspect.source import Source
from cpr.vmm.inspect.values import leaves

STATES = sorted(path.name for path in DATA.glob("*.cprstate.bin"))
FILES = STATES + [f"{name}.vmstate" for name in STREAMS]
SMALL = [name for name in FILES if (DATA / name).stat().st_size < 2000]
TRANSCRIBED = sorted(path.name.removesuffix(".sections.txt") for path in DATA.glob("*.txt"))
NONE = golden("machine_none")
MEMFD1 = (DATA / "memfd1.cprstate.bin").read_bytes()


def run(*arguments: object) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of one `inspect`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["inspect", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def as_json(*arguments: object) -> dict:
    return json.loads(run("--json", *arguments)[1])


def inspected(data: bytes, **options: bool) -> source.Found:
    return source.inspect(Source("test", data), **options)


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "file") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


# --- good files


@pytest.mark.parametrize("name", STATES)
def test_golden_states(name):
    path = DATA / name
    status, out, err = run(path)
    assert (status, err) == (0, "")
    data = path.read_bytes()
    found = as_json(path)
    expected = CprState.decode(data).fds
    assert [(e["name"], e["id"], e["fd"]) for e in found["entries"]] == expected
    for entry in found["entries"]:
        assert data[entry["offset"] + 5 :].startswith(entry["name"].encode() + b"\0")
        assert entry["name"] in out
        assert entry["descriptor"] is None
    assert (found["kind"], found["size"], found["flaws"]) == ("CprState", len(data), [])


@pytest.mark.parametrize("name", STREAMS)
def test_golden_streams_are_shown_to_their_last_byte(name):
    status, out, err = run(DATA / f"{name}.vmstate", "--fields")
    assert (status, err) == (0, "")
    found = as_json(DATA / f"{name}.vmstate")
    end = 8
    for item in found["items"]:
        assert item["offset"] == end
        assert item["name"] in out
        end += item["size"]
    assert end == found["size"] == len(golden(name))
    assert found["flaws"] == []


@pytest.mark.parametrize("name", TRANSCRIBED)
def test_sections_are_where_another_parser_found_them(name):
    lines = []
    for item in as_json(DATA / f"{name}.vmstate")["items"]:
        if "section_id" not in item:
            continue
        words = [item["offset"], item["kind"], item["section_id"]]
        if item["kind"] != "END":
            words += [item["name"], item["instance_id"], item["version_id"]]
        lines.append(" ".join(map(str, [*words, item["size"] - 5])))
    transcript = (DATA / f"{name}.sections.txt").read_text().splitlines()
    assert lines == [line for line in transcript if line.split()[1] in ("START", "END", "FULL")]


@pytest.mark.parametrize("name", STREAMS)
def test_field_values_are_those_that_the_codec_decodes(name):
    data = golden(name)
    devices = {(d["name"], d["instance_id"]): d for d in description_of(data)["devices"]}
    compared = 0
    for item in inspected(data).items:
        device = devices.get((item.name, item.instance_id))
        if device is None or not understood(device):
            continue
        body = BytesReader(data[item.body_offset : item.body_offset + item.body_size])
        state = decode(vmsd_of(device), body, device["version"])
        for value in item.fields:
            if value.parts is None and value.name in state:
                assert value.value == state[value.name]
                compared += 1
    assert compared > 5


def test_some_field_values():
    found = as_json(DATA / "memfd1.vmstate", "--fields", "--section", "i8254")
    (item,) = found["items"]
    channels = [each for each in item["fields"] if each["type"] == "struct"]
    assert [each["name"] for each in channels] == ["channels[0]", "channels[1]", "channels[2]"]
    count = channels[0]["fields"][0]
    assert count == {"name": "count", "type": "int32", "offset": 0x1CD3, "size": 4, "value": 65536}
    _, out, _ = run(DATA / "memfd1.vmstate", "--fields", "--section", "globalstate")
    assert 'buffer  runstate              "running" in 32 bytes' in out
    assert "66 zero bytes" in out


def test_the_configuration_and_its_subsections():
    found = as_json(DATA / "none_uuid_capabilities.vmstate", "--fields")
    assert found["machine"] == "none"
    assert found["capabilities"] == ["x-ignore-shared", "mapped-ram"]
    assert found["uuid"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    _, out, _ = run(DATA / "none_uuid_capabilities.vmstate", "--fields")
    assert "configuration/capabilities.capabilities  x-ignore-shared mapped-ram" in out


def test_vfio_devices(file):
    state = CprState([("0000:3a:10.1", 0, 9)], [VfioDevice("0000:3a:10.1", 1, 2, 3)])
    path = file(state.encode())
    assert as_json(path)["vfio_devices"] == [
        {"offset": 70, "name": "0000:3a:10.1", "devid": 1, "ioas_id": 2, "hwpt_id": 3}
    ]
    assert "VFIO DEVICE" in run(path)[1]


def test_columns_are_aligned():
    _, out, _ = run(DATA / "memfd1.cprstate.bin")
    lines = out.splitlines()[2:]
    column = lines[0].index("FD")
    assert {line[column : column + 2] for line in lines[1:]} == {"20", "10", "16", "19", "17", "11"}


def test_a_section_is_selected_by_a_pattern():
    path = DATA / "memfd1.vmstate"
    assert {item["name"] for item in as_json(path, "--section", "ps2*")["items"]} == {
        "ps2kbd",
        "ps2mouse",
    }
    assert "RAM BLOCK" not in run(path, "--section", "ps2*")[1]
    entries = as_json(DATA / "memfd1.cprstate.bin", "--section", "pc.*")["entries"]
    assert {entry["name"] for entry in entries} == {"pc.bios", "pc.rom"}
    status, _, err = run(path, "--section", "nosuch")
    assert status == 1
    assert "there is no section or entry 'nosuch'" in err


def test_a_stream_that_begins_later_in_the_file(file):
    path = file(bytes(4096) + NONE)
    assert run(path)[0] == 1
    status, out, _ = run(path, "--offset", "0x1000")
    assert status == 0
    assert "migration stream, 1089 bytes" in out
    assert run(path, "--offset", "99999")[2].endswith("there is nothing at offset 99999\n")


# --- RAM


def stream_with_ram(
    body: bytes, capabilities: tuple[str, ...] = (), device: dict | None = None
) -> bytes:
    written = bytearray()
    writer = StreamWriter(written.extend)
    writer.header()
    writer.configuration(Configuration("pc", capabilities))
    writer.start(1, "ram", 0, 4, body + RAM_END)
    writer.command(SWITCHOVER_START)
    writer.end(1, RAM_END)
    writer.device(2, "d", 0, DEVICE, device or {"x": 1, "y": -2, "raw": b"abcd"})
    writer.eof()
    writer.vmdescription()
    return bytes(written)


DEVICE = VMStateDescription("d", 1, 1, (u8("x"), i32("y"), buffer("raw", 4)))
BLOCKS = [Block("ram0", 4 * PAGE_SIZE, address=0), Block("rom", PAGE_SIZE, address=0xFFFFF000)]


def ram_of(data: bytes) -> list[tuple]:
    found = inspected(data)
    assert found.flaws == []
    return [
        (b.idstr, b.used_length, b.address, b.normal, b.zero, b.xbzrle)
        for b in found.blocks.values()
    ]


def test_the_pages_of_a_golden_stream_are_counted():
    path = DATA / "none_pages.vmstate"
    (block,) = as_json(path)["ram"]
    assert (block["block"], block["normal_pages"], block["zero_pages"]) == ("ram0", 3, 13)
    assert "16 pages" in run(path)[1]


def test_pages_of_several_blocks_are_counted():
    encoder = PageEncoder()
    page = b"\7" * PAGE_SIZE
    body = block_list(BLOCKS, with_addresses=True)
    body += encoder.zero_page("ram0", 0) + encoder.page("ram0", PAGE_SIZE, page)
    body += encoder.page("rom", 0, page) + encoder.page("ram0", 2 * PAGE_SIZE, page)
    body += (3 * PAGE_SIZE | 0x60).to_bytes(8, "big") + b"\1\0\5delta"
    assert ram_of(stream_with_ram(body, ("x-ignore-shared",))) == [
        ("ram0", 4 * PAGE_SIZE, 0, 2, 1, 1),
        ("rom", PAGE_SIZE, 0xFFFFF000, 1, 0, 0),
    ]


def mapped_ram(contents: list[bytes]) -> bytes:
    """A stream with mapped-ram: its ram0 has `contents` (b'' for zeros), its rom is not in it."""
    head = stream_with_ram(b"", ("mapped-ram",))
    begin = head.index(b"\0\0\0\0\0\0\0\x10")  # the END of the body of the START
    used = len(contents) * PAGE_SIZE
    listed = (used + PAGE_SIZE | 4).to_bytes(8, "big")
    listed += b"\4ram0" + used.to_bytes(8, "big") + b"\0\0\0\1" + PAGE_SIZE.to_bytes(8, "big")
    bitmap = sum(1 << i for i, content in enumerate(contents) if content).to_bytes(8, "little")
    bitmap_offset = begin + len(listed) + 16
    listed += bitmap_offset.to_bytes(8, "big") + (1 << 20).to_bytes(8, "big") + bitmap
    pages = b"".join(content.ljust(PAGE_SIZE, b"\0") for content in contents)
    rest = b"\3rom" + PAGE_SIZE.to_bytes(8, "big")
    rest += b"\0\0\0\1" + PAGE_SIZE.to_bytes(8, "big") + bytes(16)
    return (head[:begin] + listed).ljust(1 << 20, b"\0") + pages + rest + head[begin:]


def test_pages_of_mapped_ram_are_counted():
    assert ram_of(mapped_ram([b"", b"a", b"", b"b"])) == [
        ("ram0", 4 * PAGE_SIZE, None, 2, 2, 0),
        ("rom", PAGE_SIZE, None, 0, 0, 0),
    ]


def test_large_files_are_mapped(file, monkeypatch):
    monkeypatch.setattr(source, "MAPPED_FROM", 100)
    assert run(DATA / "memfd1.vmstate")[0] == 0
    data = golden("none_pages")
    assert run("--diff", file(data, "a"), file(data, "b"))[0] == 0


# --- bad files


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


PC = golden("memfd1")
JSON = NONE.index(b'{"configuration"')
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
        "the file ends 20 or more bytes too early, inside the entry of a descriptor that begins "
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
        50 - 4,
        "RAM block 'ram0' is 8192 bytes long, but only 4096 are left of the total",
    ),
    "page of no block": (
        stream_with_ram(block_list(BLOCKS) + PageEncoder().zero_page("ramX", 0)),
        74 - 2,
        "Can't find block ramX",
    ),
    "page outside": (
        stream_with_ram(block_list(BLOCKS) + PageEncoder().zero_page("rom", PAGE_SIZE)),
        74 - 2,
        "Illegal RAM offset 1000",
    ),
    "cut in mapped pages": (
        mapped_ram([b"a"])[: (1 << 20) + 100],
        (1 << 20) + 100,
        "the file ends 3996 or more bytes too early, inside section 1 'ram' that begins at "
        "offset 57 (0x39)",
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
def test_what_is_wrong_and_where(file, data, offset, text):
    path = file(data)
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
    "too long": ({"fields": [{**FIELD, "array_len": 1000}]}, "described as 1000 bytes, more than"),
    "too short": ({"fields": [FIELD]}, "Missing section footer for timer"),
    "struct": (
        {"fields": [{**nested(1), "size": 2}]},
        "struct 's' is described as 2 bytes, but its fields as 1",
    ),
    "nested": ({"fields": [nested(400)]}, "nested too deeply"),
}


@pytest.mark.parametrize(("change", "text"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_description_that_is_wrong(change, text):
    (flaw,) = inspected(described_as(change)).flaws
    assert text in flaw.text


def test_names_are_printed_without_control_characters(file):
    data = CprState([("\x1b[2J\n", 0, 7)], []).encode()
    status, out, _ = run(file(data))
    assert status == 0
    assert "\\x1b[2J\\n" in out
    assert "\x1b" not in out


def test_files_that_cannot_be_read(tmp_path):
    assert run(tmp_path / "nosuch") == (
        1,
        "",
        f"cpr-vmm: Could not open '{tmp_path}/nosuch': No such file or directory\n",
    )
    assert run(tmp_path)[0] == 1
    assert run("/dev/null") == (1, "", "cpr-vmm: /dev/null: it is a device, not a file\n")


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["--diff", "a"], ["--diff", "-", "-"], ["--offset", "-1", "a"], ["--bogus"]],
    ids=" ".join,
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


# --- stdin and pipes


def in_a_process(arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = f"{sys.executable} -m cpr.vmm inspect {arguments}"
    return subprocess.run(
        command, shell=True, cwd=ROOT, input=stdin, capture_output=True, check=False
    )


def test_stdin():
    done = in_a_process("-", NONE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"stdin: migration stream, 1089 bytes")
    done = in_a_process("-")
    assert done.stderr == b"cpr-vmm: stdin: offset 0 (0x0): the file is empty\n"
    assert in_a_process(f"--diff - {DATA}/machine_none.vmstate", NONE).returncode == 0


def test_a_reader_that_goes_away_is_no_error():
    done = in_a_process(f"--fields {DATA}/memfd1.vmstate | head -n 1")
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b""


# --- comparing


def test_a_file_is_the_same_as_itself():
    for name in FILES:
        status, out, _ = run("--diff", DATA / name, DATA / name)
        assert (status, out.splitlines()[-1]) == (0, "no difference")


def test_states_are_compared(file):
    a = CprState([("ram0", 0, 7), ("rom", 0, 8)], [VfioDevice("dev", 1, 2, 3)])
    b = CprState([("new", 1, 9), ("ram0", 0, 10)], [VfioDevice("dev", 1, 2, 4)])
    paths = file(a.encode(), "a"), file(b.encode(), "b")
    status, out, _ = run("--diff", *paths)
    assert status == 1
    assert out.splitlines()[2:] == [
        "entry 'ram0' id 0 fd is 7 in A and 10 in B",
        "entry 'rom' id 0 is only in A",
        "entry 'new' id 1 is only in B",
        "VFIO device 'dev' hwpt_id is 3 in A and 4 in B",
    ]
    differences = as_json("--diff", *paths)["differences"]
    assert (differences[0]["a"], differences[0]["b"]) == (7, 10)
    assert run("--diff", "--section", "nosuch", *paths)[0] == 2


def test_the_order_of_the_entries_is_no_difference(file):
    entries = [("ram0", 0, 7), ("rom", 0, 8)]
    a, b = CprState(entries, []), CprState(entries[::-1], [])
    assert run("--diff", file(a.encode(), "a"), file(b.encode(), "b"))[0] == 0


def test_streams_are_compared_field_by_field(file):
    encoder = PageEncoder()
    body = block_list(BLOCKS) + encoder.zero_page("ram0", 0)
    a = stream_with_ram(
        body + encoder.page("ram0", PAGE_SIZE, bytes(PAGE_SIZE)),
        device={"x": 1, "y": -2, "raw": b"\1\2\3\4"},
    )
    b = stream_with_ram(
        body + encoder.page("ram0", PAGE_SIZE, b"\1" * PAGE_SIZE),
        device={"x": 16, "y": -2, "raw": b"\1\2\3\5"},
    )
    status, out, _ = run("--diff", file(a, "a"), file(b, "b"))
    assert status == 1
    assert out.splitlines()[2:] == [
        "d/0 x is 0x1 in A and 0x10 in B",
        "d/0 raw: 1 of 4 bytes differ, the first at 0x3 is 04 in A and 05 in B",
        "RAM block 'ram0': 1 pages differ, at 0x1000",
    ]


def test_pages_are_compared_whatever_their_encoding(file):
    encoder = PageEncoder()
    body = block_list([Block("ram0", 2 * PAGE_SIZE), Block("rom", PAGE_SIZE)])
    body += encoder.page("ram0", PAGE_SIZE, b"a".ljust(PAGE_SIZE, b"\0"))
    body += encoder.zero_page("ram0", 0)
    plain, mapped = file(stream_with_ram(body), "a"), file(mapped_ram([b"", b"a"]), "b")
    assert run("--diff", "--section", "ram", plain, mapped)[:1] == (0,)
    other = file(mapped_ram([b"a", b"a"]), "c")
    assert run("--diff", "--section", "ram", plain, other)[1].endswith(
        "RAM block 'ram0': 1 pages differ, at 0x0\n"
    )


def test_golden_streams_are_compared():
    status, out, _ = run("--diff", DATA / "memfd1.vmstate", DATA / "microvm.vmstate")
    lines = out.splitlines()
    assert status == 1
    assert 'configuration name is "pc-i440fx-11.1" in A and "microvm" in B' in lines
    assert "PCIHost/0 is only in A" in lines
    assert "cpu/0 env.regs[4] is 0x6f04 in A and 0x6fb8 in B" in lines
    assert "RAM block 'pc.bios' used_length is 262144 in A and 131072 in B" in lines


def test_what_cannot_be_compared(tmp_path):
    state, stream = DATA / "memfd1.cprstate.bin", DATA / "memfd1.vmstate"
    status, _, err = run("--diff", state, stream)
    assert status == 2
    assert "only two CPR states, or two migration streams, can be compared" in err
    assert run("--diff", state, tmp_path / "nosuch")[0] == 2


# --- processes

HOLDER = """
import fcntl, os, sys
def memfd(name, data, seals=0):
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
ram = memfd("ram", bytes(8192), fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
for state in sys.argv[1:]:
    fd = memfd("QEMU_CPR_EXEC_STATE", bytes.fromhex(state).replace(b"RAMF", ram.to_bytes(4, "big")))
    os.set_inheritable(fd, True)
print(ram, flush=True)
sys.stdin.read()
"""


class Holder:
    """A process with a memfd 'ram' and a state memfd for each of `states`; b'RAMF' is its fd."""

    def __init__(self, *states: bytes, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *[state.hex() for state in states]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        self.pid = self.process.pid
        self.ram = int(self.process.stdout.readline())

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate()


def state_of(*names: str) -> bytes:
    fd = int.from_bytes(b"RAMF", "big")
    return CprState([(name, 0, fd) for name in names], []).encode()


def test_the_state_of_a_process():
    with Holder(state_of("ram0")) as holder:
        status, out, err = run(holder.pid)
        found = as_json(holder.pid)
        target = os.stat(f"/proc/{holder.pid}/fd/{holder.ram}")
        by_path = as_json(f"/proc/{holder.pid}/fd/{holder.ram + 1}")
    assert (status, err) == (0, "")
    assert f"process {holder.pid} descriptor {holder.ram + 1}" in out
    assert "8192 (8 KiB)  shrink,grow  on       /memfd:ram (deleted)" in out
    assert by_path["entries"] == found["entries"]
    descriptor = found["entries"][0]["descriptor"]
    assert descriptor.pop("written") == target.st_mtime_ns
    assert descriptor == {
        "fd": holder.ram,
        "target": "/memfd:ram (deleted)",
        "inode": target.st_ino,
        "size": 8192,
        "seals": ["shrink", "grow"],
        "cloexec": True,
        "offset": 8192,
    }


def test_a_descriptor_that_is_not_open():
    with Holder(CprState([("ram0", 0, 999)], []).encode()) as holder:
        status, out, err = run(holder.pid)
        assert status == 1
        assert err.endswith(
            f"offset 8 (0x8): 'ram0' id 0: descriptor 999 is not open in process {holder.pid}\n"
        )


def test_of_several_states_the_last_one_counts():
    with Holder(state_of("old"), state_of("new")) as holder:
        found = as_json(holder.pid)
        assert [entry["name"] for entry in found["entries"]] == ["new"]
        assert f"there is also {holder.ram + 1}" in found["source"]


def test_processes_are_compared():
    with Holder(state_of("ram0")) as a, Holder(state_of("ram0")) as b:
        status, out, _ = run("--diff", a.pid, b.pid)
    assert status == 1
    assert out.splitlines()[2].startswith("entry 'ram0' id 0 inode is ")


def test_a_process_without_a_state():
    with Holder(**{STATE_NAME: "33"}) as holder:
        status, out, err = run(holder.pid)
        found = as_json(holder.pid)
    assert status == 1
    assert "/memfd:ram (deleted)" in out
    assert f"process {holder.pid} has no CPR state" in err
    assert f"is a memfd named {STATE_NAME}" in err
    assert f"it was started with {STATE_NAME}=33" in err
    assert [each["fd"] for each in found["memory"]] == [holder.ram]


def test_a_process_that_is_not_there():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert run(process.pid) == (1, "", f"cpr-vmm: there is no process {process.pid}\n")


def test_the_state_of_a_real_update(start, accel, tmp_path):
    vm = start.guest("heartbeat", accel)
    ram = os.stat(vm.ram_path()).st_ino
    vm.qmp.command(
        "migrate-set-parameters", mode="cpr-exec", cpr_exec_command=["/bin/sleep", "1000"]
    )
    vm.qmp.send("migrate", uri=f"file:{tmp_path}/vmstate")
    wait_for(lambda: Path(f"/proc/{vm.pid}/comm").read_text() == "sleep\n", "the exec")
    status, _, err = run(vm.pid)
    assert (status, err) == (0, "")
    entries = {entry["name"]: entry["descriptor"] for entry in as_json(vm.pid)["entries"]}
    assert entries["ram0"]["inode"] == ram
    assert entries["ram0"]["cloexec"] is False
    status, out, err = run(tmp_path / "vmstate", "--fields")
    assert (status, err) == (0, "")
    assert '"running"' in out
