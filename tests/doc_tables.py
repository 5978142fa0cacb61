"""A Markdown document as the tests read it: headings, tables and paragraphs below them, links."""

from __future__ import annotations

import re
from pathlib import Path

HEADING = re.compile(r"#+ (?P<title>.*)$")
CELL = re.compile(r"(?<!\\)\|")


class Document:
    """Titles are without Markdown; cells are without backticks and with \\| as |."""

    def __init__(self, path: Path) -> None:
        self._text: dict[str, str] = {}
        title, in_fence = "", False
        for line in path.read_text().splitlines():
            in_fence ^= line.startswith("```")
            heading = None if in_fence else HEADING.match(line)
            if heading:
                title = heading["title"]
                assert title not in self._text, f"{path.name} has two headings '{title}'"
                self._text[title] = ""
            elif title:
                self._text[title] += line + "\n"

    def titles(self, beginning: str) -> list[str]:
        return [title for title in self._text if title.startswith(beginning)]

    def text(self, title: str) -> str:
        """What is between this heading and the next."""
        return self._text[title]

    def tables(self, title: str) -> list[list[list[str]]]:
        """The tables below a heading, each as its rows without the header."""
        found = re.findall(r"(?:^\|.*\n)+", self._text[title], re.MULTILINE)
        return [[_cells(line) for line in table.splitlines()[2:]] for table in found]

    def rows(self, title: str) -> list[list[str]]:
        """The rows of all the tables below a heading."""
        return [row for table in self.tables(title) for row in table]

    def column(self, title: str) -> list[str]:
        """The first cells of these rows."""
        return [row[0] for row in self.rows(title)]

    def paragraph(self, title: str, beginning: str) -> str:
        """The paragraph below a heading that begins like this, on one line."""
        (found,) = [p for p in self._text[title].split("\n\n") if p.strip().startswith(beginning)]
        return " ".join(found.split())

    def links(self) -> list[str]:
        """The targets of all links to files and headings."""
        targets = re.findall(r"\]\(([^)\s]+)\)", "".join(self._text.values()))
        return [target for target in targets if "://" not in target]

    def anchors(self) -> set[str]:
        """What a link to a heading has after its #."""
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in self._text}


def words(text: str, separator: str = "") -> list[str]:
    """What is in backticks, or between separators; nothing in an empty text."""
    if separator:
        return text.split(separator) if text else []
    return re.findall(r"`([^`]+)`", text)


def _cells(line: str) -> list[str]:
    cells = [cell.strip() for cell in CELL.split(line.strip())[1:-1]]
    return [cell.replace("\\|", "|").replace("`", "") for cell in cells]
