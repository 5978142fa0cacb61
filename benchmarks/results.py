"""What a run leaves behind: one JSON file, written after every case and read to go on."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from harness.vm import ALL_CPUS, ROOT

from benchmarks import settings
from benchmarks.cases import Case
from benchmarks.pause import Result
from benchmarks.peer import Peer

FORMAT = 1
FOLDER = ROOT / "build" / "benchmarks"


def machine() -> dict[str, Any]:
    """What the figures depend on, beside the settings of the run."""
    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu or platform.machine(),
        "cores": len(ALL_CPUS),
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "load": psutil.getloadavg()[0],
        "settings": settings.describe(),
    }


def versions(peer: Peer | None) -> dict[str, str]:
    found = {"cpr": version("cpr-vmm"), "python": platform.python_version()}
    return found | ({"qemu": peer.version} if peer else {})


class Document:
    """One kind of results ("run", "save", …) with the machine, versions and settings of the run.

    `entries` is the list of results, each a dict; `put` replaces what has the same `key`.
    """

    def __init__(self, kind: str, path: Path, options: dict[str, Any], peer: Peer | None) -> None:
        self.path = path
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": machine(),
            "versions": versions(peer),
            "options": options,
        }
        self.entries: list[dict[str, Any]] = []

    @classmethod
    def load(cls, path: Path) -> Document:
        """Raises ValueError naming the file where it is no such document."""
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']}, this program's {FORMAT}")
            document = cls.__new__(cls)
            document.path = path
            document.entries = values.pop("entries")
            document.header = values
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no results of a benchmark: {error}") from None
        return document

    def save(self) -> None:
        """Replaces the file at once, so that an interruption leaves the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(self.header | {"entries": self.entries}, indent=1) + "\n")
        scratch.replace(self.path)

    def put_aside(self) -> None:
        """Keeps the file of an earlier run under its date."""
        if self.path.exists():
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.path.stat().st_mtime))
            self.path.rename(self.path.with_name(f"{self.path.stem}-{stamp}.json"))

    # The results of `run`.

    def results(self) -> list[Result]:
        return [Result.from_dict(entry) for entry in self.entries]

    def put(self, result: Result) -> None:
        others = [entry for entry in self.entries if Case.from_dict(entry) != result.case]
        self.entries = [*others, result.to_dict()]
        self.save()

    def has(self, case: Case) -> bool:
        """Whether the case is measured, or was found impossible."""
        return any(Case.from_dict(entry) == case for entry in self.entries)
