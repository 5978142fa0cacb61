"""The inner tests of the last runs, one column a kernel, as a Markdown table.

python -m tests.nested.table
"""

from __future__ import annotations

import json
from pathlib import Path

from .kernels import KERNELS
from .mirror import LOGS


def outcomes(log: Path) -> dict[str, str]:
    """Result and seconds of each test, by its name without the folder, in the order of the run."""
    found: dict[str, str] = {}
    for line in log.read_text(errors="replace").splitlines():
        if '"report"' not in line:
            continue
        report = json.loads(line[line.index("{") :])["report"]
        name = report["nodeid"].removeprefix("tests/nested/inside/")
        decides = report["when"] == "call" or report["outcome"] != "passed"
        if decides and found.get(name, "passed").startswith("passed"):
            found[name] = f"{report['outcome']}, {report['duration']:.1f} s"
    return found


def main() -> None:
    logs = {name: LOGS / f"{name}.jsonl" for name in KERNELS}
    runs = {name: outcomes(log) for name, log in logs.items() if log.exists()}
    print("| test |", " | ".join(runs), "|")
    print("|---" * (len(runs) + 1) + "|")
    for test in dict.fromkeys(test for run in runs.values() for test in run):
        print(f"| `{test}` |", " | ".join(run.get(test, "") for run in runs.values()), "|")


if __name__ == "__main__":
    main()
