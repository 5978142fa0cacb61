"""The verb `inspect`: good files, RAM pages, stdin, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from described import DATA, STREAMS, description_of, golden, understood, vmsd_of
from inspecting import BLOCKS, STATES, as_json, inspected, mapped_ram, run, stream_with_ram
from ram_records import PageEncoder, block_list

from cpr.constants import PAGE_SIZE
from cpr.state.cpr_state import CprState, VfioDevice
from cpr.state.reader import BytesReader
from cpr.state.vmstate import decode
from cpr.vmm.inspect import source

TRANSCRIBED = sorted(
    path.name.removesuffix(".sections.txt") for path in DATA.glob("*.sections.txt")
)
NONE = golden("machine_none")


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes) -> Path:
        path = tmp_path / "file"
        path.write_bytes(data)
        return path

    return write


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
        {"offset": 62, "name": "0000:3a:10.1", "devid": 1, "ioas_id": 2, "hwpt_id": 3}
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


def test_pages_of_mapped_ram_are_counted():
    assert ram_of(mapped_ram([b"", b"a", b"", b"b"])) == [
        ("ram0", 4 * PAGE_SIZE, None, 2, 2, 0),
        ("rom", PAGE_SIZE, None, 0, 0, 0),
    ]


def test_large_files_are_mapped(file, monkeypatch):
    monkeypatch.setattr(source, "MAPPED_FROM", 100)
    assert run(DATA / "memfd1.vmstate")[0] == 0
    assert run(file(golden("none_pages")))[0] == 0


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
