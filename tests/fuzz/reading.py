"""Fuzzes one reader: `python -m tests.fuzz.reading NAME SECONDS SEED`, and says how it went.

By atheris, which is guided by coverage, where that is installed; else by mutations without it.
What a reader raised is kept in tests/fuzz/corpus, and the exit status is 1.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

try:
    import atheris
except ImportError:
    atheris = None

MOST = 1 << 16  # bytes of an input that atheris makes
MEMORY_MB = 2048


def keep(name: str, data: bytes) -> Path:
    from fuzz.readers import CORPUS

    path = CORPUS / name / hashlib.sha1(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def without_coverage(name: str, seconds: float, seed: int) -> bool:
    from fuzz.mutate import mutate
    from fuzz.readers import READERS, seeds

    read, inputs = READERS[name][0], seeds(name)
    chance, runs, end = random.Random(f"{name} {seed}"), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(chance, inputs)
        runs += 1
        try:
            read(data)
        except Exception:
            traceback.print_exc()
            print(f"{name}: kept in {keep(name, data)}")
            return False
    print(f"{name}: {runs} executions without coverage")
    return True


def by_coverage(name: str, seconds: float, seed: int) -> bool:
    """In a process of its own: libFuzzer ends the one that it is in."""
    from fuzz.readers import seeds

    with tempfile.TemporaryDirectory(prefix="cpr-fuzz-") as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, data in enumerate(seeds(name)):
            (corpus / str(number)).write_bytes(data)
        done = subprocess.run(
            [sys.executable, __file__, "--inside", name, str(int(seconds)), str(seed), folder],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stderr.splitlines()
        if done.returncode:
            print(done.stdout[-4000:], "\n".join(lines[-60:]))
            for path in Path(folder).glob("found-*"):
                print(f"{name}: kept in {keep(name, path.read_bytes())}")
            return False
    figures = {line.split(":")[2]: line.split()[1] for line in lines if line.startswith("stat::")}
    runs, added = figures["number_of_executed_units"], figures["new_units_added"]
    print(f"{name}: {runs} executions by atheris, {added} inputs with new coverage")
    return True


def inside(name: str, seconds: str, seed: str, folder: str) -> None:
    with atheris.instrument_imports(include=["cpr"]):
        from fuzz.readers import READERS

    options = [
        *(f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MOST}"),
        *(f"-artifact_prefix={folder}/found-", "-print_final_stats=1", "-timeout=20"),
        f"-rss_limit_mb={MEMORY_MB}",
    ]
    atheris.Setup([sys.argv[0], *options, f"{folder}/corpus"], READERS[name][0])
    atheris.Fuzz()


def main() -> int:
    if sys.argv[1] == "--inside":
        inside(*sys.argv[2:])
        return 0
    name, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    fuzz = by_coverage if atheris is not None else without_coverage
    return 0 if fuzz(name, seconds, seed) else 1


if __name__ == "__main__":
    sys.exit(main())
