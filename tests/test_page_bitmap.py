"""page_bitmap.py: against what Python makes of the same bits."""

from __future__ import annotations

import ctypes
import mmap
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr.page_bitmap import READ_PAGES, PageBitmap, existing_pages


def number(bitmap: PageBitmap) -> int:
    return int.from_bytes(bitmap.words, "little")


@given(st.integers(1, 300), st.data())
def test_set_and_count(pages, data):
    bitmap, expected = PageBitmap(pages), 0
    for _ in range(4):
        first = data.draw(st.integers(0, pages))
        count = data.draw(st.integers(0, pages - first))
        bitmap.set(first, count)
        expected |= ((1 << count) - 1) << first
    assert number(bitmap) == expected
    assert bitmap.count() == expected.bit_count()
    bitmap.clear()
    assert (number(bitmap), bitmap.count()) == (0, 0)


@given(st.integers(0, 200), st.integers(1, 300), st.data())
def test_merge_at_any_page(first, count, data):
    words = bytearray(data.draw(st.binary(min_size=40, max_size=40)))
    before = data.draw(st.integers(0, (1 << first) - 1))
    bitmap = PageBitmap(first + count)
    bitmap.words[:] = before.to_bytes(len(bitmap.words), "little")
    bitmap.merge(first, words, count)
    bits = int.from_bytes(words, "little") & ((1 << count) - 1)
    assert number(bitmap) == before | bits << first


def test_take_moves_the_bits():
    log, dirty = PageBitmap(100), PageBitmap(100)
    log.set(63, 3)
    dirty.set(99, 1)
    dirty.take(log)
    assert number(dirty) == 0b111 << 63 | 1 << 99
    assert number(log) == 0


def test_no_bit_is_lost_between_threads():
    log, taken = PageBitmap(1 << 14), PageBitmap(1 << 14)
    threads = [
        threading.Thread(target=lambda k=k: [log.set(i, 1) for i in range(k, 1 << 14, 3)])
        for k in range(3)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken.take(log)
    taken.take(log)
    assert taken.count() == 1 << 14


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 65), (64, 1), (3, -1)])
def test_what_is_not_in_it_is_refused(first, count):
    with pytest.raises(ValueError, match="pages at"):
        PageBitmap(64).set(first, count)


@pytest.mark.parametrize(("first", "size", "count"), [(-1, 8, 1), (1, 8, 64), (0, 0, 1)])
def test_a_bitmap_that_does_not_fit_is_refused(first, size, count):
    with pytest.raises(ValueError, match="pages at"):
        PageBitmap(64).merge(first, bytearray(size), count)


def test_pages_that_exist():
    pages = 2 * READ_PAGES + 70
    written = [0, 1, 63, 64, READ_PAGES - 1, READ_PAGES, 2 * READ_PAGES + 69]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, pages * 4096, flags) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in written:
            memory[page * 4096] = 1
        first = ctypes.c_char.from_buffer(memory)
        bitmap = existing_pages(ctypes.addressof(first), pages)
        del first
    assert number(bitmap) == sum(1 << page for page in written)
