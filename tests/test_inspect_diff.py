"""`inspect --diff`: two states or two streams, field by field."""

from __future__ import annotations

from pathlib import Path

import pytest
from described import DATA
from inspecting import BLOCKS, FILES, as_json, mapped_ram, run, stream_with_ram
from ram_records import PageEncoder, block_list

from cpr.constants import PAGE_SIZE
from cpr.state.cpr_state import CprState, VfioDevice
from cpr.state.ram_section import Block


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


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
