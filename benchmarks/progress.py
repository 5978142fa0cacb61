"""How far a run is: a bar on a terminal, elsewhere one line for each case."""

from __future__ import annotations

import sys
from typing import Self


class Progress:
    """On stderr; a context manager.  `total` counts cases."""

    def __init__(self, total: int, done: int = 0) -> None:
        self._bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:  # without the `bench` extra: lines, as in a file
                return
            self._bar = tqdm(total=total, initial=done, unit="case", leave=False)

    def at(self, text: str) -> None:
        """What is going on now."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def finish(self, line: str) -> None:
        """One more case is done; `line` is what it gave."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
            self._bar.update()
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
