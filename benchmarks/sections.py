"""The report of all the results in a folder: a section of Markdown for each kind, and the plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import brownout, plots, ram_copy, rate, report, save
from benchmarks.results import Document

REPORT = "report.md"
BEGIN = "<!-- results -->"
END = "<!-- end of results -->"

# Kind of results, and file: title, and what makes its Markdown.
SECTIONS: dict[str, tuple[str, Callable[[Document], str]]] = {
    "run": ("Pause of an update", report.markdown),
    "brownout": (
        "Brown-out: time until every page is written once more",
        lambda document: _with_heading(document, brownout.markdown(document.entries)),
    ),
    "rate": (
        "Updates back to back",
        lambda document: _with_heading(document, rate.markdown(document.entries)),
    ),
    "save": (
        "Saving RAM to a file",
        lambda document: _with_heading(document, save.markdown(document.entries)),
    ),
    "ram-copy": (
        "Copying RAM, against the machine's ceilings",
        lambda document: _with_heading(document, ram_copy.markdown(document.entries)),
    ),
}


def path_of(kind: str, folder: Path) -> Path:
    return folder / f"{kind}.json"


def _with_heading(document: Document, text: str) -> str:
    left_out = {
        f"- {entry['mode']}, {entry['accel']}: {entry['skipped']}"
        for entry in document.entries
        if entry.get("skipped")
    }
    parts = [report.heading(document), text]
    if left_out:
        parts += ["Left out:", "\n".join(sorted(left_out))]
    return "\n\n".join(parts) + "\n"


def documents(folder: Path) -> list[Document]:
    """All results in `folder`.  Raises ValueError where there are none."""
    paths = [path for kind in SECTIONS if (path := path_of(kind, folder)).exists()]
    if not paths:
        raise ValueError(f"{folder}: no results; 'python -m benchmarks run' makes them")
    return [Document.load(path) for path in paths]


def markdown(found: list[Document], level: int = 2) -> str:
    """The sections of all the documents, with headings of `level`."""
    parts = []
    for document in found:
        title, write = SECTIONS[document.header["kind"]]
        parts.append(f"{'#' * level} {title}\n\n{write(document)}")
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
