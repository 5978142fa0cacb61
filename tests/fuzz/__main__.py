"""All fuzzers, one after the other: `make fuzz MINUTES=10`.  Says what each has done.

Readers of bytes have half of the time, guests and the monitor a fifth each, and the C a tenth.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from conftest import ROOT  # noqa: E402

from fuzz import guests, monitor  # noqa: E402
from fuzz.reading import atheris  # noqa: E402

NAMES = (
    *("cpr-state", "cpr-channel", "stream", "mapped-ram", "inspect", "qmp-json", "messages"),
    *("command-line", "config", "uri", "kernel"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    words = parser.parse_args()
    os.chdir(ROOT)
    subprocess.run(["make", "-s", "-C", "examples"], check=True)
    seconds, good = words.minutes * 60, True
    print(
        f"seed {words.seed}; readers {'by atheris' if atheris else 'without coverage'}", flush=True
    )
    for name in NAMES:
        share = [str(seconds / 2 / len(NAMES)), str(words.seed)]
        good &= (
            subprocess.run([sys.executable, "-m", "tests.fuzz.reading", name, *share]).returncode
            == 0
        )
    native = ["make", "-s", "-C", "tests/native", "fuzz", f"SECONDS={int(seconds / 10)}"]
    good &= subprocess.run([*native, f"SEED={words.seed}"]).returncode == 0
    with tempfile.TemporaryDirectory(prefix="cpr-fuzz-") as folder:
        good &= guests.fuzz(seconds / 5, words.seed, Path(folder))
    for accel in ("kvm", "tcg"):
        good &= monitor.fuzz(accel, seconds / 10, words.seed)
    print("nothing was found" if good else "FOUND: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
