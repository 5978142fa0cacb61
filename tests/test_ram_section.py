"""ram_section.py: QEMU's own pages and block lists, and each of its complaints."""

from __future__ import annotations

import struct
from errno import EINVAL, EIO

import pytest
from described import blocks, golden, reader_of
from hypothesis import given
from hypothesis import strategies as st
from ram_records import PageEncoder, block_list

from cpr.state.ram_section import (
    CONTINUE,
    END,
    EOS,
    HOOK,
    MEM_SIZE,
    MULTIFD_FLUSH,
    PAGE,
    PAGE_SIZE,
    VERSION_ID,
    ZERO,
    Block,
    RamDecoder,
)
from cpr.state.reader import LoadError

SIZE = 16 << 20


def ram_bodies(name: str, decoder: RamDecoder) -> list[tuple[bytes, list]]:
    """The bodies of the 'ram' sections of a golden stream without devices, and their pages."""
    stream = golden(name)
    reader = reader_of(stream)
    reader.header()
    reader.configuration()
    found: list[tuple] = []
    for section in reader.sections(None):
        if section.idstr != "ram":
            return found
        begin = reader.offset
        pages = list(decoder.pages(reader, section.version_id))
        found.append((stream[begin : reader.offset], pages))
    raise AssertionError("no devices")


def expected_ram() -> bytes:
    ram = bytearray(64 << 10)
    ram[4096:8192] = bytes(i * 7 & 255 for i in range(4096))
    ram[5 * 4096] = 1
    ram[-1] = 255
    return bytes(ram)


def test_the_pages_of_a_golden_stream_are_its_ram():
    found = ram_bodies("none_pages", RamDecoder(blocks("none_pages")))
    ram = {}
    for _, pages in found:
        for idstr, offset, data in pages:
            assert idstr == "ram0"
            ram[offset] = data or bytes(PAGE_SIZE)
            assert (data is None) == (offset // PAGE_SIZE not in (1, 5, 15))
    assert b"".join(ram[offset] for offset in sorted(ram)) == expected_ram()


def test_the_pages_of_a_golden_stream_encode_to_the_same():
    encoder = PageEncoder()
    start, *others = ram_bodies("none_pages", RamDecoder(blocks("none_pages")))
    assert start == (block_list(blocks("none_pages")) + END, [])
    for body, pages in others:
        records = [
            encoder.zero_page(idstr, offset) if data is None else encoder.page(idstr, offset, data)
            for idstr, offset, data in pages
        ]
        assert b"".join(records) + END == body


@pytest.mark.parametrize("name", ["memfd1", "microvm"])
def test_the_block_list_of_a_golden_stream_encodes_to_the_same(name):
    # The order of the blocks is the source's own; the decoder does not depend on it.
    (body, _), *_ = ram_bodies(name, RamDecoder(reversed(blocks(name))))
    order = sorted(blocks(name), key=lambda block: body.index(block.idstr.encode()))
    assert block_list(order) + END == body


def test_addresses_are_there_with_ignore_shared():
    decoder = RamDecoder(blocks("exec_ignore"), with_addresses=True)
    decoder.blocks["pc.bios"].address = 0xFFFC0000
    (body, _), *_ = ram_bodies("exec_ignore", decoder)
    order = sorted(blocks("exec_ignore"), key=lambda block: body.index(block.idstr.encode()))
    for block in order:
        block.address = {"pc.bios": 0xFFFC0000, "pc.rom": 0xC0000}.get(block.idstr)
    assert block_list(order, with_addresses=True) + END == body


def word(value: int) -> bytes:
    return struct.pack(">Q", value)


def named(idstr: bytes) -> bytes:
    return bytes([len(idstr)]) + idstr


def ram0(length: int = SIZE, total: int = SIZE, idstr: bytes = b"ram0") -> bytes:
    return word(total | MEM_SIZE) + named(idstr) + word(length)


def decode(body: bytes, block: Block | None = None, version_id: int = VERSION_ID) -> list:
    decoder = RamDecoder([block or Block("ram0", SIZE)])
    return list(decoder.pages(reader_of(body), version_id))


ACCEPTED = {
    "list": ram0() + END,
    "nothing": END,
    "no blocks": word(MEM_SIZE) + END,
    "list with CONTINUE": word(SIZE | MEM_SIZE | CONTINUE) + ram0()[8:] + END,
    "EOS with CONTINUE": word(EOS | CONTINUE),
    "hook": word(HOOK) + END,
    "flush": word(MULTIFD_FLUSH) + END,
}


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED)
def test_bodies_that_qemu_takes(body):
    assert decode(body) == []


UNKNOWN = "Unknown combination of migration flags: "
ZERO_PAGE = word(ZERO) + named(b"ram0") + b"\0"
REFUSED = {
    "total too big": (ram0(total=2 * SIZE) + END, EINVAL, ['Unknown ramblock "", cannot accept']),
    "total too small": (ram0(total=4096) + END, EINVAL, ['Unknown ramblock "", cannot accept']),
    "size": (
        ram0(length=SIZE // 2) + END,
        EINVAL,
        ["Size mismatch: ram0: 0x800000 != 0x1000000: Invalid argument"],
    ),
    "name": (ram0(idstr=b"ramX") + END, EINVAL, ['Unknown ramblock "ramX", cannot accept']),
    "no name": (ram0(idstr=b"") + END, EINVAL, ['Unknown ramblock "", cannot accept']),
    "flag 0": (word(0) + END, EINVAL, [UNKNOWN + "0x0"]),
    "flag 1": (word(1) + END, EINVAL, [UNKNOWN + "0x1"]),
    "flag 0x400": (word(0x400) + END, EINVAL, [UNKNOWN + "0x400"]),
    "list and EOS": (word(SIZE | MEM_SIZE | EOS) + ram0()[8:], EINVAL, [UNKNOWN + "0x14"]),
    "zero and EOS": (word(ZERO | EOS) + named(b"ram0") + b"\0", EINVAL, [UNKNOWN + "0x12"]),
    "zero and page": (word(ZERO | PAGE) + named(b"ram0") + b"\0", EINVAL, [UNKNOWN + "0xa"]),
    "and continued": (
        ZERO_PAGE + word(ZERO | PAGE | CONTINUE) + b"\0",
        EINVAL,
        [UNKNOWN + "0x2a"],
    ),
    "zero page of ones": (ZERO_PAGE[:-1] + b"\1", EINVAL, ["Found a zero page with value 1"]),
    "page of no block": (
        word(ZERO) + named(b"ramX") + b"\0",
        EINVAL,
        ["Can't find block ramX", "Illegal RAM offset 0"],
    ),
    "continued at first": (
        word(ZERO | CONTINUE) + b"\0",
        EINVAL,
        ["Ack, bad migration stream!", "Illegal RAM offset 0"],
    ),
    "zero page outside": (
        word(SIZE | ZERO) + named(b"ram0") + b"\0",
        EINVAL,
        ["Illegal RAM offset 1000000"],
    ),
    "page outside": (
        word(SIZE | PAGE) + named(b"ram0") + bytes(PAGE_SIZE),
        EINVAL,
        ["Illegal RAM offset 1000000"],
    ),
    "empty": (b"", EIO, ["Getting RAM address failed"]),
    "cut before EOS": (ram0(), EIO, ["Getting RAM address failed"]),
    "cut in a word": (ram0() + END[:3], EIO, ["Getting RAM address failed"]),
    "cut before the list": (ram0()[:8], EINVAL, ['Unknown ramblock "", cannot accept']),
    "cut in a name": (ram0()[:-9], EINVAL, ['Unknown ramblock "ram", cannot accept']),
    "cut in zeros of a length": (ram0()[:-3], EIO, []),
    "cut in a page": (word(PAGE) + named(b"ram0") + bytes(4000), EIO, []),
    "cut in a page's name": (
        word(PAGE) + named(b"ram0")[:3],
        EINVAL,
        ["Can't find block ra", "Illegal RAM offset 0"],
    ),
    "cut in a zero page": (ZERO_PAGE[:-1], EIO, []),
}


@pytest.mark.parametrize(("body", "errno", "lines"), REFUSED.values(), ids=REFUSED)
def test_bodies_that_qemu_refuses(body, errno, lines):
    with pytest.raises(LoadError) as caught:
        decode(body)
    assert caught.value.errno == errno
    assert str(caught.value) == f"ret: {-errno}"
    wanted = [line + " migration" if line.endswith("accept") else line for line in lines]
    assert list(caught.value.stderr) == wanted


def test_another_version_is_refused():
    with pytest.raises(LoadError) as caught:
        decode(END, version_id=3)
    assert (caught.value.errno, caught.value.stderr) == (EINVAL, ())


def test_a_resizable_block_takes_the_length_of_the_stream():
    block = Block("ram0", 0x20000, 0x200000)
    decode(ram0(0x40000, 0x40000) + END, block)
    assert block.used_length == 0x40000
    with pytest.raises(LoadError) as caught:
        decode(ram0(0x400000, 0x400000) + END, block)
    assert caught.value.stderr == ("Size too large: ram0: 0x400000 > 0x200000: Invalid argument",)


def test_an_address_must_agree_where_it_matters():
    body = block_list([Block("ram0", SIZE, address=4096)], with_addresses=True) + END
    decoder = RamDecoder([Block("ram0", SIZE, address=0)], with_addresses=True)
    with pytest.raises(LoadError) as caught:
        list(decoder.pages(reader_of(body), VERSION_ID))
    assert caught.value.stderr == ("Mismatched GPAs for block ram0 4096!= 0",)
    decoder = RamDecoder([Block("ram0", SIZE)], with_addresses=True)
    assert list(decoder.pages(reader_of(body), VERSION_ID)) == []


def test_a_page_continues_in_the_block_of_the_section_before():
    encoder = PageEncoder()
    first = encoder.zero_page("ram0", 0) + encoder.zero_page("ram1", 0) + END
    second = encoder.page("ram1", PAGE_SIZE, b"x" * PAGE_SIZE) + END
    assert second[:8] == word(PAGE_SIZE | PAGE | CONTINUE)
    decoder = RamDecoder([Block("ram0", SIZE), Block("ram1", SIZE)])
    assert list(decoder.pages(reader_of(first), VERSION_ID)) == [
        ("ram0", 0, None),
        ("ram1", 0, None),
    ]
    assert list(decoder.pages(reader_of(second), VERSION_ID)) == [
        ("ram1", PAGE_SIZE, b"x" * PAGE_SIZE)
    ]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ram0", "pc.bios", "/rom@etc/acpi/tables"]),
            st.integers(0, SIZE // PAGE_SIZE - 1),
            st.none() | st.binary(min_size=1, max_size=8),
        )
    )
)
def test_any_pages_round_trip(pages):
    pages = [(i, n * PAGE_SIZE, d and d.ljust(PAGE_SIZE, b"-")) for i, n, d in pages]
    encoder = PageEncoder()
    body = b"".join(
        encoder.zero_page(idstr, offset) if data is None else encoder.page(idstr, offset, data)
        for idstr, offset, data in pages
    )
    decoder = RamDecoder(Block(name, SIZE) for name in ("ram0", "pc.bios", "/rom@etc/acpi/tables"))
    assert list(decoder.pages(reader_of(body + END), VERSION_ID)) == pages


@given(st.lists(st.sampled_from([*ACCEPTED.values(), ZERO_PAGE, word(ZERO | CONTINUE), b"\0"])))
def test_arbitrary_records_decode_or_raise_one_error(records):
    try:
        decode(b"".join(records))
    except LoadError as error:
        assert error.errno in (EINVAL, EIO)
