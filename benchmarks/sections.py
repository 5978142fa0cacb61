"""The report of all the results in a folder: a section of Markdown for each kind, and the plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import brownout, plots, ram_copy, rate, report, save, virtio
from benchmarks.results import Document

REPORT = "report.md"
BEGIN = "<!-- results -->"
END = "<!-- end of results -->"

# Kind of results, and name of their file: the title of their section.
TITLES = {
    "run": "Pause of an update",
    "brownout": "Brown-out: time until every page is written once more",
    "rate": "Updates back to back",
    "save": "Saving RAM to a file",
    "virtio": "Disk and network of a Linux guest",
    "ram-copy": "Copying RAM, against the machine's ceilings",
}
TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "brownout": brownout.markdown,
    "rate": rate.markdown,
    "save": save.markdown,
    "virtio": virtio.markdown,
    "ram-copy": ram_copy.markdown,
}


def path_of(kind: str, folder: Path) -> Path:
    return folder / f"{kind}.json"


def _section(document: Document) -> str:
    if document.header["kind"] == "run":
        return report.markdown(document)
    left_out = {
        f"- {entry['mode']}, {entry['accel']}: {entry['skipped']}"
        for entry in document.entries
        if entry.get("skipped")
    }
    table = TABLES[document.header["kind"]]
    parts = [report.heading(document), table(document.entries)]
    if left_out:
        parts += ["Left out:", "\n".join(sorted(left_out))]
    return "\n\n".join(parts) + "\n"


def documents(folder: Path) -> list[Document]:
    """All results in `folder`.  Raises ValueError where there are none."""
    paths = [path for kind in TITLES if (path := path_of(kind, folder)).exists()]
    if not paths:
        raise ValueError(f"{folder}: no results; 'python -m benchmarks run' makes them")
    return [Document.load(path) for path in paths]


def markdown(found: list[Document], level: int = 2) -> str:
    """The sections of all the documents, with headings of `level`."""
    parts = []
    for document in found:
        title = TITLES[document.header["kind"]]
        parts.append(f"{'#' * level} {title}\n\n{_section(document)}")
    return "\n".join(parts)


def put_into(path: Path, text: str) -> None:
    """Replaces what is between the lines BEGIN and END of a document.

    Raises ValueError where it has not both.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: no lines '{BEGIN}' and '{END}' for the results to go between")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def write(folder: Path) -> tuple[str, list[Path]]:
    """Writes the report and the plots of all the results in `folder`; returns text and paths."""
    found = documents(folder)
    text = markdown(found)
    path = folder / REPORT
    path.write_text(text)
    paths = [path]
    for document in found:
        if document.header["kind"] == "run":
            paths += plots.draw(document.results(), folder)
    return text, paths
