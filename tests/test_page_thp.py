"""Records written to a file on a tmpfs, whose pages are huge where the kernel can."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Iterator
from errno import EFBIG, ENOSPC
from pathlib import Path

import pytest
from page_memory import ZEROS, Memory, encoded

from cpr.errors import KernelError
from cpr.pages import PAGE_SIZE, PagePool, RecordWriter

COUNT = 4096  # pages: 16 MiB
HUGE = 2 << 20


@pytest.fixture(scope="module")
def source() -> Iterator[tuple[Memory, bytes]]:
    """16 MiB, a quarter of them zero, and the records of them."""
    generator = random.Random(1)
    pages = [generator.choice([ZEROS, *[generator.randbytes(PAGE_SIZE)] * 3]) for _ in range(COUNT)]
    with Memory(COUNT) as memory:
        for number, page in enumerate(pages):
            memory[number] = page
        yield memory, encoded(pages, set(range(COUNT)))


def huge_pages() -> int:
    """Bytes of huge pages in all the files of this machine's tmpfs mounts."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemHugePages"))


def obstacle() -> str:
    """Why a memfd cannot get huge pages by MADV_COLLAPSE here, or ''."""
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1):
        return f"Linux {os.uname().release} has no MADV_COLLAPSE for a memfd; 6.1 has"
    switch = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not switch.exists() or "[deny]" in switch.read_text():
        return f"{switch} is not there or says deny"
    return ""


def write(memory: Memory, fd: int, budget: int) -> int:
    """Writes all the records, in calls of `budget` bytes; returns the bytes."""
    pages, total = memory.pages(), 0
    with PagePool(2) as pool:
        writer = RecordWriter(pool, pages, "ram0")
        while not pages.done:
            total += writer.write(fd, budget).bytes
            assert os.fstat(fd).st_size >= os.lseek(fd, 0, os.SEEK_CUR)
    return total


@pytest.mark.parametrize("budget", [5 << 20, 1 << 30])
@pytest.mark.parametrize("begin", [0, 12345, HUGE])
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_the_file_has_the_records_and_ends_with_them(source, budget, begin, flags):
    memory, records = source
    whole = os.memfd_create("file")
    os.write(whole, b"h" * begin)
    fd = os.open(f"/proc/self/fd/{whole}", flags)
    os.lseek(fd, begin, os.SEEK_SET)
    assert write(memory, fd, budget) == len(records)
    assert os.lseek(fd, 0, os.SEEK_CUR) == begin + len(records)
    assert os.pread(whole, begin + len(records) + 1, 0) == b"h" * begin + records
    os.close(fd)
    os.close(whole)


def test_what_was_behind_stays(source):
    memory, records = source
    fd = os.memfd_create("file")
    os.pwrite(fd, b"t" * HUGE, len(records))
    write(memory, fd, 1 << 30)
    assert os.pread(fd, 1 << 30, 0) == records + b"t" * HUGE
    os.close(fd)


def test_the_pages_are_huge(source):
    if text := obstacle():
        pytest.skip(text)
    memory, records = source
    fd = os.memfd_create("file")
    before = huge_pages()
    write(memory, fd, 1 << 30)
    assert huge_pages() - before >= len(records) // HUGE * HUGE // 2
    os.close(fd)


def test_zero_pages_take_no_room_in_advance():
    fd = os.memfd_create("file")
    with Memory(COUNT) as memory:
        size = write(memory, fd, 1 << 30)
    assert size < 10 * COUNT
    assert os.fstat(fd).st_blocks * 512 <= HUGE
    os.close(fd)


def test_a_limit_of_the_file_size_is_an_error_as_it_is_for_any_write(source):
    memory, _ = source
    fd = os.memfd_create("file")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, old[1]))
    try:
        with pytest.raises(KernelError) as caught:
            write(memory, fd, 1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.errno == EFBIG
    assert os.fstat(fd).st_size <= 9 << 20
    os.close(fd)


def test_a_full_tmpfs_is_an_error_and_no_signal(source, tmp_path):
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(KernelError) as caught:
            write(source[0], fd, 1 << 30)
        assert caught.value.errno == ENOSPC
        assert os.fstat(fd).st_size == os.lseek(fd, 0, os.SEEK_CUR)
        os.close(fd)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
