"""pages.py: against what Python makes of the same pages, with each instruction set and threads."""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Iterator
from errno import EBADF, ECANCELED, ENODATA, ENOSPC, EPERM, EPIPE

import pytest
from cpr._native._cpr import lib
from described import golden, reader_of
from hypothesis import given, settings
from hypothesis import strategies as st
from page_memory import ZEROS, Memory, encoded, memory_of

from cpr.errors import CprError, KernelError
from cpr.pages import (
    INSTRUCTION_SETS,
    PAGE_SIZE,
    ZERO_CLEAR,
    ZERO_COPY,
    ZERO_SKIP,
    PageCounts,
    PagePool,
    Pages,
    RecordLoader,
    RecordWriter,
    bitmap_size,
)
from cpr.ram import RAMBlock
from cpr.state.ram_section import END, Block, RamDecoder

RECORD_SIZE = {True: 9, False: 8 + PAGE_SIZE}
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; the fcntl module has it not
MAX_PIECES = 400  # that a stream is fed in: one byte at a time is slow
ENDS_OF_WORDS = [1, 63, 64, 65, 511, 512, 513, 1100]


def fill(memory: Memory, seed: int) -> list[bytes]:
    """Runs of holes, zeros, pages with one byte and random pages; returns the content."""
    source = random.Random(seed)
    page = 0
    while page < memory.count:
        kind = source.randrange(4)
        for _ in range(source.choice((1, 2, 3, 5, 70, 600))):
            if page == memory.count:
                break
            if kind == 1:
                memory[page] = ZEROS
            elif kind == 2:
                place = source.randrange(PAGE_SIZE)
                memory[page] = bytes(place) + b"\1" + bytes(PAGE_SIZE - place - 1)
            elif kind == 3:
                memory[page] = source.randbytes(PAGE_SIZE)
            page += 1
    return memory.content()


def selection(count: int, seed: int | None) -> tuple[bytearray | None, set[int]]:
    """A bitmap with runs of set and clear bits, and the pages it selects; None: all of them."""
    if seed is None:
        return None, set(range(count))
    source = random.Random(seed)
    selected: set[int] = set()
    page = 0
    while page < count:
        run = source.choice((1, 1, 2, 30, 64, 200))
        if source.randrange(2):
            selected.update(range(page, min(page + run, count)))
        page += run
    bits = sum(1 << page for page in selected)
    # Bits beyond the last page are set: they mean nothing.
    beyond = (1 << bitmap_size(count) * 8) - (1 << count)
    return bytearray((bits | beyond).to_bytes(bitmap_size(count), "little")), selected


@pytest.fixture(
    scope="module", params=[(name, n) for name in INSTRUCTION_SETS for n in (1, 3)], ids=str
)
def pool(request: pytest.FixtureRequest) -> Iterator[PagePool]:
    name, threads = request.param
    try:
        made = PagePool(threads, name)
    except CprError as error:
        pytest.skip(str(error))
    assert made.instruction_set == name
    yield made
    made.close()


sizes = st.sampled_from(ENDS_OF_WORDS) | st.integers(1, 700)
seeds = st.integers(0, 1 << 32)
budgets = st.sampled_from([1, PAGE_SIZE, 10 * PAGE_SIZE + 1, 1 << 20, (1 << 64) - 1])
examples = settings(max_examples=25, deadline=None)


def tally(pages: list[bytes], selected: set[int]) -> tuple[int, int]:
    zero = sum(pages[page] == ZEROS for page in selected)
    return zero, len(selected) - zero


def until_done(pages: Pages, budget: int, call) -> PageCounts:
    """Calls until the pages are done; no call takes more than its budget, or than one page."""
    total = PageCounts()
    while not pages.done:
        counts = call()
        assert counts.bytes <= max(budget, lib.CPR_RECORD_MOST)
        total.zero += counts.zero
        total.normal += counts.normal
        total.bytes += counts.bytes
    return total


@examples
@given(sizes, seeds, st.none() | seeds, budgets, st.booleans())
def test_copy(pool, count, seed, bitmap_seed, budget, inverted):
    with Memory(count) as source, Memory(count) as target:
        wanted = fill(source, seed)
        before = fill(target, seed + 1)
        bitmap, selected = selection(count, bitmap_seed)
        if bitmap is not None and inverted:
            selected = set(range(count)) - selected
        for zero_pages in (ZERO_SKIP, ZERO_COPY, ZERO_CLEAR):
            pages = source.pages(bitmap, inverted=inverted and bitmap is not None)
            counts = until_done(
                pages,
                budget,
                lambda p=pages, z=zero_pages: pool.copy(p, target.pages(), z, budget),
            )
            copied = {page for page in selected if zero_pages != ZERO_SKIP or wanted[page] != ZEROS}
            assert target.content() == [
                wanted[page] if page in copied else before[page] for page in range(count)
            ]
            zero = 0 if zero_pages == ZERO_COPY else tally(wanted, selected)[0]
            assert (counts.zero, counts.normal) == (zero, len(selected) - zero)
            before = target.content()


@examples
@given(sizes, seeds, st.none() | seeds)
def test_clear(pool, count, seed, bitmap_seed):
    with Memory(count) as memory:
        before = fill(memory, seed)
        there = memory.present()
        bitmap, selected = selection(count, bitmap_seed)
        counts = pool.clear(memory.pages(bitmap))
        assert (counts.zero, counts.normal) == tally(before, selected)
        assert memory.present() == there
        assert memory.content() == [
            ZEROS if page in selected else before[page] for page in range(count)
        ]


def written(pool: PagePool, pages: Pages) -> bytes:
    """The records that are written of the pages."""
    with open(os.memfd_create("records"), "w+b", buffering=0) as file:
        size = RecordWriter(pool, pages, "ram0").write(file.fileno()).bytes
        stream = os.pread(file.fileno(), size + 1, 0)
    assert len(stream) == size
    return stream


@examples
@given(sizes, seeds, st.none() | seeds, budgets)
def test_records_are_those_of_the_encoder(pool, count, seed, bitmap_seed, budget):
    with Memory(count) as memory, open(os.memfd_create("stream"), "w+b", buffering=0) as file:
        content = fill(memory, seed)
        there = memory.present()
        bitmap, selected = selection(count, bitmap_seed)
        pages = memory.pages(bitmap)
        writer = RecordWriter(pool, pages, "ram0")
        counts = until_done(pages, budget, lambda: writer.write(file.fileno(), budget))
        stream = encoded(content, selected)
        assert os.pread(file.fileno(), len(stream) + 1, 0) == stream
        assert (counts.zero, counts.normal) == tally(content, selected)
        assert counts.bytes == len(stream)
        assert writer.continued == bool(selected)
        assert memory.present() == there


@examples
@given(sizes, seeds, st.none() | seeds)
def test_records_are_taken_by_the_decoder(pool, count, seed, bitmap_seed):
    with Memory(count) as memory:
        content = fill(memory, seed)
        bitmap, selected = selection(count, bitmap_seed)
        stream = written(pool, memory.pages(bitmap))
        decoder = RamDecoder([Block("ram0", count * PAGE_SIZE)])
        taken = list(decoder.pages(reader_of(stream + END), 4))
        assert taken == [
            ("ram0", page * PAGE_SIZE, None if content[page] == ZEROS else content[page])
            for page in sorted(selected)
        ]


@examples
@given(sizes, seeds, st.none() | seeds, st.integers(1, 100000), st.booleans())
def test_records_of_the_encoder_are_loaded(pool, count, seed, bitmap_seed, piece, fresh):
    with Memory(count) as source, Memory(count) as target:
        content = fill(source, seed)
        before = [ZEROS] * count if fresh else fill(target, seed + 1)
        _, selected = selection(count, bitmap_seed)
        stream = encoded(content, selected) + END + b"rest"
        zero, normal = tally(content, selected)

        loader = RecordLoader(pool, [("other", Pages("other", 0, 0)), ("ram0", target.pages())])
        begin = end = 0
        piece = max(piece, len(stream) // MAX_PIECES)
        while not loader.stopped:
            end += piece
            begin += loader.feed(stream[begin:end])
        assert stream[begin:] == END + b"rest"
        assert loader.current == ("ram0" if selected else None)
        assert (loader.counts.zero, loader.counts.normal) == (zero, normal)
        assert loader.counts.bytes == begin
        if fresh:
            assert target.present() == normal
        assert target.content() == [
            content[page] if page in selected else before[page] for page in range(count)
        ]


@examples
@given(sizes, seeds, st.none() | seeds, budgets)
def test_pages_at_places_of_a_file(pool, count, seed, bitmap_seed, budget):
    offset = 3 * PAGE_SIZE
    with Memory(count) as source, Memory(count) as target, open(os.memfd_create("f"), "r+b") as f:
        content = fill(source, seed)
        there = source.present()
        bitmap, selected = selection(count, bitmap_seed)
        present = bytearray(b"\xff" * bitmap_size(count))  # what is not selected stays
        pages = source.pages(bitmap)
        counts = until_done(
            pages, budget, lambda: pool.save(pages, f.fileno(), offset, present, budget)
        )
        zero, normal = tally(content, selected)
        assert (counts.zero, counts.normal, counts.bytes) == (zero, normal, normal * PAGE_SIZE)
        assert source.present() == there
        saved = {page for page in selected if content[page] != ZEROS}
        bits = int.from_bytes(present, "little")
        for page in range(count):
            assert bits >> page & 1 == (page in saved or page not in selected)
        for page in saved:
            assert os.pread(f.fileno(), PAGE_SIZE, offset + page * PAGE_SIZE) == content[page]

        bits = sum(1 << page for page in saved)
        present = bytearray(bits.to_bytes(bitmap_size(count), "little"))
        assert pool.load(target.pages(present), f.fileno(), offset).normal == normal
        assert target.present() == normal
        loaded = [content[page] if page in saved else ZEROS for page in range(count)]
        assert target.content() == loaded
        fill(target, seed + 2)
        pool.load(target.pages(present), f.fileno(), offset)
        pool.clear(target.pages(present, inverted=True))
        assert target.content() == loaded


def golden_ram() -> list[bytes]:
    """The RAM of the golden streams with pages, see the README beside them."""
    ram = bytearray(64 << 10)
    ram[4096:8192] = bytes(i * 7 & 255 for i in range(4096))
    ram[5 * 4096] = 1
    ram[-1] = 255
    return [bytes(ram[i : i + PAGE_SIZE]) for i in range(0, len(ram), PAGE_SIZE)]


def test_records_are_those_of_qemu(pool):
    stream = golden("none_pages")
    begin = stream.index(struct.pack(">BI", 2, 1)) + 5  # the first PART of section 1
    with memory_of(golden_ram()) as memory:
        records = written(pool, memory.pages())
        assert stream[begin:].startswith(records + END)
    with Memory(16) as memory:
        loader = RecordLoader(pool, [("ram0", memory.pages())])
        assert loader.feed(stream[begin:]) == len(records)
        assert loader.stopped
        assert memory.content() == golden_ram()


# From the file that QEMU 11.1.3 writes of the same RAM with the capability mapped-ram on: the
# block's header (version, page size, offset of the bitmap, offset of the pages) and its bitmap.
# Besides these the file has page 1 at 0x101000, page 5 at 0x105000 and page 15 at 0x10f000.
MAPPED_RAM_HEADER = bytes.fromhex("00000001 0000000000001000 0000000000000082 0000000000100000")
MAPPED_RAM_BITMAP = bytes.fromhex("2280000000000000")


def test_pages_are_where_mapped_ram_has_them(pool):
    _, page_size, _, offset = struct.unpack(">IQQQ", MAPPED_RAM_HEADER)
    assert page_size == PAGE_SIZE
    present = bytearray(bitmap_size(16))
    with memory_of(golden_ram()) as memory, open(os.memfd_create("file"), "r+b") as file:
        pool.save(memory.pages(), file.fileno(), offset, present)
        assert present == MAPPED_RAM_BITMAP
        for page in (1, 5, 15):
            place = 0x100000 + page * PAGE_SIZE
            assert os.pread(file.fileno(), PAGE_SIZE, place) == golden_ram()[page]
        assert os.fstat(file.fileno()).st_blocks * 512 == 3 * PAGE_SIZE


def named(word: int, idstr: bytes) -> bytes:
    return struct.pack(">Q", word) + bytes([len(idstr)]) + idstr


LEFT = {
    "end": END,
    "block list": struct.pack(">Q", 16 * PAGE_SIZE | 4),
    "flush": struct.pack(">Q", 0x200),
    "no flag": struct.pack(">Q", 0),
    "zero and page": named(0x0A, b"ram0") + b"\0",
    "zero of ones": named(2, b"ram0") + b"\1",
    "outside": named(16 * PAGE_SIZE | 2, b"ram0") + b"\0",
    "far outside": named(0xFFFFFFFFFFFFF002, b"ram0") + b"\0",
    "unknown block": named(2, b"ram1") + b"\0",
    "a beginning of the name": named(2, b"ram") + b"\0",
}
CUT = {
    "nothing": b"",
    "word": END[:7],
    "length": struct.pack(">Q", 2),
    "name": named(2, b"ram0")[:-1],
    "fill": named(2, b"ram0"),
    "page": named(8, b"ram0") + ZEROS[:-1],
}


@pytest.mark.parametrize("before", [b"", named(PAGE_SIZE | 8, b"ram0") + b"x" * PAGE_SIZE])
@pytest.mark.parametrize("name", [*LEFT, *CUT])
def test_what_is_left_to_the_caller(name, before):
    rest = LEFT.get(name, CUT.get(name))
    with Memory(16) as memory, PagePool(1) as pool:
        loader = RecordLoader(pool, [("ram0", memory.pages())])
        assert loader.feed(before + rest) == len(before)
        assert loader.stopped == (name in LEFT)
        assert loader.current == ("ram0" if before else None)
        assert memory.present() == bool(before)


def test_continue_means_the_block_before():
    record = struct.pack(">Q", PAGE_SIZE | 8 | 0x20) + b"y" * PAGE_SIZE
    with Memory(2) as first, Memory(2) as second, PagePool(1) as pool:
        loader = RecordLoader(pool, [("a", first.pages()), ("b", second.pages())])
        assert loader.feed(record) == 0
        assert loader.stopped
        loader.current = "b"
        assert loader.feed(record) == len(record)
        assert (first.present(), second.content()[1]) == (0, b"y" * PAGE_SIZE)
        switch = named(8, b"a") + b"z" * PAGE_SIZE
        assert loader.feed(switch + record) == len(switch + record)
        assert first.content() == [b"z" * PAGE_SIZE, b"y" * PAGE_SIZE]
        assert loader.current == "a"


@pytest.mark.parametrize("blocking", [True, False])
def test_through_a_socket(pool, blocking):
    with Memory(1500) as source, Memory(1500) as target:
        content = fill(source, 5)
        near, far = socket.socketpair()
        near.setblocking(blocking)
        far.setblocking(blocking)
        pages = source.pages()

        def write() -> None:
            RecordWriter(pool, pages, "ram0").write(near.fileno())
            near.setblocking(True)
            near.sendall(END + b"devices")
            near.close()

        loader = RecordLoader(pool, [("ram0", target.pages())])
        writer = threading.Thread(target=write)
        writer.start()
        rest = b""
        while not loader.stopped:
            select.select([far], [], [])
            rest += far.recv(1 << 16)
            rest = rest[loader.feed(rest) :]
        writer.join()
        assert (END + b"devices").startswith(rest)
        assert len(rest) >= len(END)
        assert target.content() == content
        far.close()


def test_cancelling():
    near, far = os.pipe2(os.O_NONBLOCK)
    with memory_of([b"x" * PAGE_SIZE] * 64) as memory, PagePool(2) as pool:
        pages = memory.pages()
        timer = threading.Timer(0.02, pages.cancel)
        timer.start()
        with pytest.raises(KernelError) as caught:
            RecordWriter(pool, pages, "ram0").write(far)
        assert caught.value.errno == ECANCELED
        with pytest.raises(KernelError) as caught:
            pool.copy(pages, memory.pages())
        assert caught.value.errno == ECANCELED
        timer.join()
    os.close(near)
    os.close(far)


def failing(call) -> tuple[int, str]:
    with pytest.raises(KernelError) as caught:
        call()
    return caught.value.errno, str(caught.value)


def test_errors_name_what_failed():
    with memory_of(golden_ram()) as memory, PagePool(2) as pool:
        present = bytearray(bitmap_size(16))
        full = os.open("/dev/full", os.O_WRONLY)
        text = f"writing pages of RAM to descriptor {full}: No space left on device"
        assert failing(lambda: RecordWriter(pool, memory.pages(), "ram0").write(full)) == (
            ENOSPC,
            text,
        )
        assert failing(lambda: pool.save(memory.pages(), full, 0, present)) == (ENOSPC, text)
        os.close(full)
        assert failing(lambda: pool.save(memory.pages(), full, 0, present))[0] == EBADF
        empty = os.memfd_create("empty")
        assert failing(lambda: pool.load(memory.pages(), empty, 0)) == (
            ENODATA,
            f"reading pages of RAM from descriptor {empty}: No data available",
        )
        os.close(empty)
        near, far = socket.socketpair()
        near.close()
        writer = RecordWriter(pool, memory.pages(), "ram0")
        assert failing(lambda: writer.write(far.fileno()))[0] == EPIPE
        far.close()


def test_a_hole_that_cannot_be_filled_is_an_error():
    """It would be SIGBUS through the mapping, where a file system is full."""
    with Memory(16) as memory, PagePool(1) as pool:
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        loader = RecordLoader(pool, [("ram0", memory.pages())])
        stream = encoded([b"x" * PAGE_SIZE] * 16, {1, 2, 3})
        text = "loading pages: Operation not permitted"
        assert failing(lambda: loader.feed(stream)) == (EPERM, text)


def test_what_is_no_file_has_no_holes():
    with memory_of(golden_ram()) as memory, PagePool(1) as pool:
        null = os.open("/dev/null", os.O_RDWR)
        counts = pool.clear(Pages("RAM", memory.address, 16, null))
        assert (counts.zero, counts.normal) == (13, 3)
        assert memory.content() == [ZEROS] * 16
        os.close(null)


def test_misuse_is_refused():
    with Memory(65) as memory, Memory(64) as smaller, PagePool(1) as pool:
        with pytest.raises(ValueError, match="a bitmap of 65 pages has 16 bytes"):
            memory.pages(bytes(8))
        with pytest.raises(ValueError, match="aligned to 8"):
            memory.pages(memoryview(bytearray(24))[1:17])
        with pytest.raises(ValueError, match="fewer pages"):
            pool.copy(memory.pages(), smaller.pages())
        with pytest.raises(ValueError, match="too long a name"):
            RecordWriter(pool, memory.pages(), "x" * 256)
    with pytest.raises(CprError, match="this CPU has no instruction set 'abacus'"):
        PagePool(1, "abacus")
    with pytest.raises(KernelError, match="starting 0 threads for pages: Invalid argument"):
        PagePool(0)


def test_a_pool_takes_turns_and_closes_twice():
    pool = PagePool()
    assert pool.threads == len(os.sched_getaffinity(0))
    with memory_of([b"x" * PAGE_SIZE] * 2000) as source, Memory(2000) as target:
        threads = [
            threading.Thread(target=lambda: pool.copy(source.pages(), target.pages()))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert target.content() == source.content()
    pool.close()
    pool.close()


@pytest.mark.parametrize("shared", [True, False])
def test_pages_of_a_block(shared):
    """Only in shared memory are the holes of the file zero pages."""
    with memory_of(golden_ram()) as memory, PagePool(1) as pool:
        block = RAMBlock("ram0", 15 * PAGE_SIZE, "memory-backend-memfd")
        block.fd, block.host, block.shared = memory.fd, memory.address, shared
        pages = Pages.of_block(block)
        assert (pages.name, pages.count) == ("ram0", 15)
        counts = pool.clear(pages)
        assert (counts.zero, counts.normal) == (13, 2)
        assert memory.present() == (3 if shared else 16)
        written = Pages.of_block(block, bytes(8), holes=False)
        assert pool.clear(written).zero == 0
