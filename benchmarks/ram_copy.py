"""Copying and saving of guest RAM against the machine's ceilings: `python -m benchmarks ram-copy`.

All the ways are measured once in each round, one after the other; a ratio is of two measurements
of one round, so that whatever else the machine does is in both.  Ceilings are libc's memcpy, a
loop that only reads, and write(2) in 1 MiB pieces to a new file.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from harness.vm import ROOT

from benchmarks.cases import available_memory
from cpr.constants import MIB, PAGE_SIZE
from cpr.errors import CprError
from cpr.migration.load_ram import RECORDS_SIZE
from cpr.pages import (
    INSTRUCTION_SETS,
    ZERO_CLEAR,
    ZERO_SKIP,
    PagePool,
    Pages,
    RecordLoader,
    RecordWriter,
    bitmap_size,
)

SOURCE = Path(__file__).with_name("ram_ceilings.c")
LIBRARY = ROOT / "build" / "ram_ceilings.so"

MAPPED_RAM_OFFSET = MIB  # QEMU aligns the pages of a block in the file to this
RANDOM_TILE = 64 * MIB


def build() -> ctypes.CDLL:
    """Compiles the ceilings if their source is newer, and loads them."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(exist_ok=True)
        command = ["gcc", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(LIBRARY), str(SOURCE)], check=True)
    library = ctypes.CDLL(str(LIBRARY))
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.copy_pieces.argtypes = [pointer, pointer, size, size]
    library.copy_pieces.restype = None
    library.read_all.argtypes = [pointer, size]
    library.read_all.restype = ctypes.c_uint64
    return library


class FreshRam:
    """A memfd of `size` bytes, mapped, with nothing in it yet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("benchmark")
        os.ftruncate(self.fd, size)
        self._map()

    def _map(self, flags: int = 0) -> None:
        self.map = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED | flags)
        self._first = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._first)

    def pages(self, bitmap: bytearray | None = None) -> Pages:
        return Pages("RAM", self.address, self.size // PAGE_SIZE, self.fd, bitmap)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._first
        self.map.close()
        os.close(self.fd)


class Ram(FreshRam):
    """A memfd of which all pages are there, random or zero, and in the page tables."""

    def __init__(self, size: int, random: bool) -> None:
        super().__init__(size)
        tile = os.urandom(min(RANDOM_TILE, size)) if random else bytes(min(RANDOM_TILE, size))
        for offset in range(0, size, len(tile)):
            os.pwrite(self.fd, tile[: size - offset], offset)
        self._map(mmap.MAP_POPULATE)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def on_threads(count: int, work: Callable[[int], object]) -> None:
    """Calls work(0), ... work(count - 1), each on a thread."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def touch(size: int) -> None:
    """Has the machine back `size` bytes of memory that the saving is about to use.

    A virtual machine may have given free memory back to its host: to have it again takes longer
    than all that is measured here.
    """
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as view:
        view.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(view)
        ctypes.memset(ctypes.addressof(first), 1, size)
        del first


class Results:
    """Seconds of each way by round, with what each is compared to."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.sizes: dict[str, int] = {}
        self.ceilings: dict[str, str | None] = {}

    def add(self, name: str, size: int, seconds: float, ceiling: str | None = None) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.sizes[name] = size
        self.ceilings[name] = ceiling

    def entries(self) -> list[dict[str, Any]]:
        """All of it as JSON."""
        return [
            {
                "name": name,
                "size": self.sizes[name],
                "ceiling": self.ceilings[name],
                "seconds": seconds,
            }
            for name, seconds in self.seconds.items()
        ]

    def ratios(self, name: str) -> list[float]:
        """The bandwidth of `name` as a part of its ceiling's, by round."""
        ceiling = self.ceilings[name]
        if ceiling is None:
            return []
        scale = self.sizes[name] / self.sizes[ceiling]
        pairs = zip(self.seconds[name], self.seconds[ceiling], strict=True)
        return [scale * theirs / ours for ours, theirs in pairs]

    def table(self) -> str:
        titles = ["way", "GiB", "s median", "s best", "GB/s median", "GB/s best", "of"]
        titles += ["ratio median", "ratio best"]
        lines = [" | ".join(["", *titles, ""]).strip(), "|---" * len(titles) + "|"]
        for name, seconds in self.seconds.items():
            size = self.sizes[name]
            median, best = statistics.median(seconds), min(seconds)
            ratios = self.ratios(name)
            cells = [
                name,
                f"{size / (1 << 30):.2f}",
                f"{median:.3f}",
                f"{best:.3f}",
                f"{size / median / 1e9:.1f}",
                f"{size / best / 1e9:.1f}",
                self.ceilings[name] or "",
                f"{statistics.median(ratios):.2f}" if ratios else "",
                f"{max(ratios):.2f}" if ratios else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


class Copying:
    """Copies of random pages, and searches through zero pages, in memory."""

    def __init__(self, results: Results, random: Ram, zero: Ram, target: Ram) -> None:
        self._library = build()
        self._results = results
        self._random = random
        self._zero = zero
        self._target = target

    def memcpy(self, name: str, piece: int, ceiling: str | None = None) -> None:
        addresses = (self._target.address, self._random.address, self._random.size)
        seconds = timed(lambda: self._library.copy_pieces(*addresses, piece))
        self._results.add(name, self._random.size, seconds, ceiling)

    def read(self, name: str, threads: int) -> None:
        share = self._zero.size // threads
        address = self._zero.address

        def work(number: int) -> None:
            self._library.read_all(address + number * share, share)

        self._results.add(name, self._zero.size, timed(lambda: on_threads(threads, work)))

    def copy_random(self, name: str, pool: PagePool, ceiling: str) -> None:
        source, target = self._random.pages(), self._target.pages()
        seconds = timed(lambda: pool.copy(source, target, ZERO_CLEAR))
        self._results.add(name, self._random.size, seconds, ceiling)

    def search_zero(self, name: str, pool: PagePool, ceiling: str) -> None:
        source, target = self._zero.pages(), self._target.pages()
        seconds = timed(lambda: pool.copy(source, target, ZERO_SKIP))
        self._results.add(name, self._zero.size, seconds, ceiling)


def measure_copying(results: Results, size: int, rounds: int, threads: list[int]) -> None:
    """Each thread count with the fastest instruction set, and each instruction set on a thread."""
    pools = [PagePool(count) for count in threads]
    sets = [pool for name in INSTRUCTION_SETS if (pool := pool_of(name))]
    with Ram(size, True) as random, Ram(size, False) as zero, Ram(size, False) as target:
        copying = Copying(results, random, zero, target)
        for _ in range(rounds):
            copying.memcpy("memcpy", size)
            copying.memcpy("memcpy by page", PAGE_SIZE, "memcpy")
            for pool in pools:
                copying.copy_random(f"copy random, {pool.threads} thr", pool, "memcpy")
            for pool in sets:
                copying.copy_random(f"copy random, {pool.instruction_set}", pool, "memcpy")
            copying.read("read, 1 thr", 1)
            for pool in pools:
                read = f"read, {pool.threads} thr"
                if pool.threads > 1:
                    copying.read(read, pool.threads)
                copying.search_zero(f"zero pages, {pool.threads} thr", pool, read)
            for pool in sets:
                copying.search_zero(f"zero pages, {pool.instruction_set}", pool, "read, 1 thr")
    for pool in (*pools, *sets):
        pool.close()


def pool_of(instruction_set: str) -> PagePool | None:
    """A pool of one thread, or None where the CPU has not that instruction set."""
    try:
        return PagePool(1, instruction_set)
    except CprError:
        return None


def load_records(loader: RecordLoader, fd: int) -> None:
    """As a VMM takes them: a piece of the stream at a time."""
    pending = b""
    while piece := os.read(fd, RECORDS_SIZE - len(pending)):
        pending += piece
        pending = pending[loader.feed(pending) :]


class Saving:
    """Saves RAM to a new file `path` each time, and loads it back into a fresh memfd."""

    def __init__(self, path: Path, ram: Ram, kind: str) -> None:
        self.path = path
        self.ram = ram
        self.kind = kind

    def write(self, results: Results) -> None:
        """The ceiling of random pages: nothing but write(2)."""
        view = memoryview(self.ram.map)

        def work() -> None:
            for offset in range(0, self.ram.size, MIB):
                os.write(fd, view[offset : offset + MIB])

        fd = self._new_file()
        results.add("write, random", self.ram.size, timed(work))
        os.close(fd)

    def records(self, results: Results, pool: PagePool) -> None:
        fd = self._new_file()
        writer = RecordWriter(pool, self.ram.pages(), "ram0")
        self._add(results, "save records", pool, timed(lambda: writer.write(fd)))
        os.lseek(fd, 0, os.SEEK_SET)
        with FreshRam(self.ram.size) as target:
            loader = RecordLoader(pool, [("ram0", target.pages())])
            self._add(results, "load records", pool, timed(lambda: load_records(loader, fd)))
        os.close(fd)

    def mapped(self, results: Results, pool: PagePool) -> None:
        fd = self._new_file()
        present = bytearray(bitmap_size(self.ram.size // PAGE_SIZE))
        source = self.ram.pages()
        seconds = timed(lambda: pool.save(source, fd, MAPPED_RAM_OFFSET, present))
        self._add(results, "save mapped-ram", pool, seconds)
        with FreshRam(self.ram.size) as target:
            fresh = target.pages(present)
            seconds = timed(lambda: pool.load(fresh, fd, MAPPED_RAM_OFFSET))
            self._add(results, "load mapped-ram", pool, seconds)
        os.close(fd)

    def _new_file(self) -> int:
        self.path.unlink(missing_ok=True)
        touch(2 * self.ram.size)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def _add(self, results: Results, what: str, pool: PagePool, seconds: float) -> None:
        name = f"{what}, {self.kind}, {pool.threads} thr"
        results.add(
            name, self.ram.size, seconds, "write, random" if self.kind == "random" else None
        )


def measure_saving(
    results: Results, folder: str, size: int, rounds: int, threads: list[int]
) -> None:
    """Saves RAM of random pages, and of zero pages, to new files in `folder`; loads them."""
    pools = [PagePool(count) for count in threads]
    for kind in ("random", "zero"):
        with Ram(size, kind == "random") as ram, tempfile.TemporaryDirectory(dir=folder) as name:
            saving = Saving(Path(name) / "ram", ram, kind)
            for _ in range(rounds):
                if kind == "random":
                    saving.write(results)
                for pool in pools:
                    saving.records(results, pool)
                    saving.mapped(results, pool)
    for pool in pools:
        pool.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=int, default=1024, help="MiB of each RAM to copy")
    parser.add_argument("--save", type=int, default=4096, help="MiB of RAM to save; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save-rounds", type=int, default=3)
    parser.add_argument("--folder", default="/dev/shm", help="where to save to")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, len(os.sched_getaffinity(0))}),
    )


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each way.  Raises RuntimeError where there is not enough memory."""
    need = max(3 * options.memory, 3 * options.save) * MIB
    if available_memory() < need * 5 // 4:
        raise RuntimeError(f"{need // MIB} MiB of memory are needed; see --memory and --save")
    results = Results()
    measure_copying(results, options.memory * MIB, options.rounds, options.threads)
    if options.save:
        arguments = (options.folder, options.save * MIB, options.save_rounds, options.threads)
        measure_saving(results, *arguments)
    return results.entries()


def markdown(entries: list[dict[str, Any]]) -> str:
    """A row for each way."""
    results = Results()
    for entry in entries:
        for seconds in entry["seconds"]:
            results.add(entry["name"], entry["size"], seconds, entry["ceiling"])
    return results.table()
