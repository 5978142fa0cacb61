"""The model of a pause: a + b * RAM, through the medians of the sizes of a series of cases.

Pauses have a long tail, so the line goes through medians, and how far a single update may be off is
taken from the pauses themselves: the line is fitted again to many random draws from them (a
bootstrap), and a random residual is added to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean, median

from benchmarks.cases import GIB, size_text
from benchmarks.pause import Result
from benchmarks.quantiles import percentile

FEWEST = 3  # pauses that make a model
DRAWS = 1000
INTERVAL = (0.025, 0.975)
Series = tuple[str, str, str, str, str]
Line = tuple[float, float]


@dataclass(frozen=True)
class Model:
    """pause = `line[0]` ms + `line[1]` ms for each GiB, from `count` pauses.

    `drawn` are lines that the pauses allow as well, `residuals` the pauses less the line in ms;
    `sizes` are those that were measured, in bytes.
    """

    line: Line
    drawn: tuple[Line, ...]
    residuals: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.residuals)

    def predict(self, ram: int) -> tuple[float, float, float]:
        """The typical pause in ms, and between what 95 % of updates are to be expected."""
        random = Random(ram)  # the same answer to the same question
        pauses = [_at(line, ram) + random.choice(self.residuals) for line in self.drawn]
        low, high = (max(0.0, percentile(pauses, share)) for share in INTERVAL)
        return max(0.0, _at(self.line, ram)), low, high

    def caution(self, ram: int) -> str:
        """What is to be said about a prediction for `ram` bytes; "" where it was measured."""
        low, high = self.sizes[0], self.sizes[-1]
        if low == high != ram:
            return (
                f"only {size_text(low)} was measured: whether the pause grows with RAM is unknown"
            )
        if ram > high:
            return (
                f"extrapolated to {ram / high:.1f} times the largest RAM measured, "
                f"{size_text(high)}: it holds if the pause goes on as a line"
            )
        if ram < low:
            return f"extrapolated below the smallest RAM measured, {size_text(low)}"
        return ""


def _at(line: Line, ram: int) -> float:
    return line[0] + line[1] * ram / GIB


def _line(pauses: dict[int, list[float]]) -> Line:
    """The least-squares line through the median at each size; flat where there is one size."""
    sizes = [size / GIB for size in pauses]
    medians = [median(each) for each in pauses.values()]
    mean, level = fmean(sizes), fmean(medians)
    variation = sum((size - mean) ** 2 for size in sizes)
    slope = 0.0
    if variation:
        products = ((s - mean) * (m - level) for s, m in zip(sizes, medians, strict=True))
        slope = sum(products) / variation
    return level - slope * mean, slope


def fit(pauses: dict[int, list[float]]) -> Model:
    """Fits the pauses in ms by size in bytes.  Raises ValueError for less than FEWEST."""
    count = sum(map(len, pauses.values()))
    if count < FEWEST:
        raise ValueError(f"{count} pauses are too few for a model")
    line, random = _line(pauses), Random(count)
    drawn = tuple(
        _line({size: random.choices(each, k=len(each)) for size, each in pauses.items()})
        for _ in range(DRAWS)
    )
    residuals = tuple(p - _at(line, size) for size, each in pauses.items() for p in each)
    return Model(line, drawn, residuals, tuple(sorted(pauses)))


def fit_all(results: Sequence[Result]) -> dict[Series, Model]:
    """A model of each series that has enough pauses."""
    found: dict[Series, dict[int, list[float]]] = {}
    for result in results:
        if not result.skipped and result.pauses:
            found.setdefault(result.case.series, {})[result.case.ram] = result.pauses
    enough = {s: p for s, p in found.items() if sum(map(len, p.values())) >= FEWEST}
    return {series: fit(pauses) for series, pauses in enough.items()}


def answer(models: dict[Series, Model], ram: int, wanted: Sequence[str | None]) -> str:
    """What an update of `ram` bytes will cost, by series; `wanted` has None where any will do.

    Raises ValueError, naming what there is, where nothing measured is like that.
    """
    lines = []
    for series, model in models.items():
        if any(want not in (None, part) for want, part in zip(wanted, series, strict=True)):
            continue
        mode, accel, pages, backing, guest = series
        pause, low, high = model.predict(ram)
        lines.append(
            f"{mode}, {accel}, {pages} pages, {backing}, {guest}: {pause:.2f} ms; "
            f"95 % of updates between {low:.2f} and {high:.2f} ms"
        )
        lines.append(
            f"    {model.line[0]:.2f} ms + {model.line[1]:.3f} ms per GiB, from {model.count} "
            f"updates at {', '.join(map(size_text, model.sizes))}"
        )
        if caution := model.caution(ram):
            lines.append(f"    {caution}")
    if not lines:
        known = ", ".join(" ".join(series) for series in models) or "nothing"
        raise ValueError(f"nothing of that kind was measured; there is: {known}")
    return "\n".join([f"Pause of one update of a guest with {size_text(ram)} of RAM:", *lines])
