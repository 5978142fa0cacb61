"""The machine's settings that cases need: huge pages and shmem_enabled, set and given back.

What a setting was is in JOURNAL from before the first change until all are restored, so that
after a run that was killed the next one can restore them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.cases import HUGETLB, PAGE_SIZES

JOURNAL = Path("/run/cpr-benchmarks-settings.json")
HUGEPAGES = Path("/sys/kernel/mm/hugepages")
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MEMINFO = Path("/proc/meminfo")


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP: `status` is what to exit with."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: interrupted")
        self.status = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns the first signal that ends the process into Interrupted; later ones are ignored.

    So everything that was changed is restored on the way out.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pool(pages: str) -> Path:
    """The pool of huge pages of 2M or 1G."""
    return HUGEPAGES / f"hugepages-{PAGE_SIZES[pages] >> 10}kB" / "nr_hugepages"


def read(path: Path) -> str:
    """A setting's value; of a list of choices the one in brackets."""
    text = path.read_text().strip()
    return text.partition("[")[2].partition("]")[0] or text


class Settings:
    """Changes settings and gives them back in the opposite order; a context manager.

    Raises RuntimeError, saying why, where the machine has not what is asked for.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Path, str]] = []

    def prepare(self, pages: str, sizes: list[int]) -> None:
        """What VMs with RAM of `sizes` bytes on these pages need."""
        if pages in HUGETLB:
            self.hugepages(pages, sum(size // PAGE_SIZES[pages] for size in sizes))
        elif pages == "THP":
            self.transparent_hugepages()

    def hugepages(self, pages: str, count: int) -> None:
        """Has `count` huge pages beside those that are in the pool already."""
        path = pool(pages)
        if not path.exists():
            raise RuntimeError(f"this machine has no {pages} pages")
        want = int(read(path)) + count
        self._write(path, str(want))
        if (got := int(read(path))) < want:
            raise RuntimeError(
                f"only {max(0, got - want + count)} of {count} {pages} pages can be had: memory "
                "is short or in pieces"
            )

    def transparent_hugepages(self) -> None:
        """Has the kernel back memfds with transparent huge pages."""
        if not SHMEM_ENABLED.exists():
            raise RuntimeError("this kernel has no transparent huge pages for shared memory")
        self._write(SHMEM_ENABLED, "always")

    def _write(self, path: Path, value: str) -> None:
        self._before.append((path, read(path)))
        try:
            self._save()
            path.write_text(value)
        except OSError as error:
            raise RuntimeError(f"cannot set {path}: {error.strerror}; run it as root") from None

    def _save(self) -> None:
        if self._before:
            changed = [(str(path), value) for path, value in self._before]
            JOURNAL.write_text(json.dumps({"pid": os.getpid(), "before": changed}))
        else:
            JOURNAL.unlink(missing_ok=True)

    def restore(self) -> None:
        """A signal that comes meanwhile takes effect afterwards."""
        interrupted = None
        while self._before:
            try:
                self._restore_last()
            except Interrupted as error:
                interrupted = error
        self._save()
        if interrupted is not None:
            raise interrupted

    def _restore_last(self) -> None:
        path, value = self._before[-1]
        try:
            if read(path) != value:
                path.write_text(value)
        except OSError as error:
            print(f"cannot set {path} back to {value}: {error.strerror}", file=sys.stderr)
        self._before.pop()

    def __enter__(self) -> Settings:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def restore_leftovers() -> list[str]:
    """Restores what a run that was killed has left; warnings of that, and of other leftovers.

    Raises RuntimeError while that run is still under way.
    """
    warnings = []
    if JOURNAL.exists():
        journal = json.loads(JOURNAL.read_text())
        if psutil.pid_exists(journal["pid"]):
            raise RuntimeError(f"another benchmark runs, PID {journal['pid']}: wait for its end")
        for name, value in reversed(journal["before"]):
            if read(Path(name)) != value:
                Path(name).write_text(value)
                warnings.append(f"a run that was killed had changed {name}: set back to {value}")
        JOURNAL.unlink()
    for pages in HUGETLB:
        if pool(pages).exists() and (count := int(read(pool(pages)))):
            warnings.append(f"{count} {pages} pages are reserved already; they stay so")
    if SHMEM_ENABLED.exists() and (value := read(SHMEM_ENABLED)) != "never":
        warnings.append(f"shmem_enabled is '{value}': cases of 4K pages may get huge ones")
    return warnings


def shmem_hugepages() -> int:
    """Bytes of transparent huge pages that shared memory has now, in all processes."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("ShmemHugePages:"):
            return int(line.split()[1]) << 10
    return 0


def describe() -> dict[str, str]:
    """The settings as they are, for the results."""
    found = {str(path): read(path) for path in (SHMEM_ENABLED,) if path.exists()}
    for pages in HUGETLB:
        if pool(pages).exists():
            found[str(pool(pages))] = read(pool(pages))
    return found
