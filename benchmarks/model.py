"""The model of a pause: a + b * RAM, fitted to the single pauses of a series of cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.cases import GIB, size_text
from benchmarks.pause import Result
from benchmarks.quantiles import student

CONFIDENCE = 0.95
Series = tuple[str, str, str, str]


@dataclass(frozen=True)
class Model:
    """pause = `intercept` ms + `slope` ms for each GiB, by least squares over `count` pauses.

    `spread` is their standard deviation about the line in ms; `mean` and `variation` are of the
    measured sizes in GiB, the latter as the sum of squared differences; `sizes` are those sizes
    in bytes.
    """

    intercept: float
    slope: float
    count: int
    spread: float
    mean: float
    variation: float
    sizes: tuple[int, ...]

    def predict(self, ram: int) -> tuple[float, float]:
        """The pause of one update in ms, and by how much it may be off (95 %)."""
        distance = ram / GIB - self.mean
        leverage = distance**2 / self.variation if self.variation else 0.0
        freedom = self.count - (2 if self.variation else 1)
        width = self.spread * math.sqrt(1 + 1 / self.count + leverage)
        return self.intercept + self.slope * ram / GIB, student(CONFIDENCE, freedom) * width

    def caution(self, ram: int) -> str:
        """What is to be said about a prediction for `ram` bytes; "" where it was measured."""
        low, high = self.sizes[0], self.sizes[-1]
        if low == high != ram:
            return (
                f"only {size_text(low)} was measured: whether the pause grows with RAM is unknown"
            )
        if ram > high:
            times = ram / high
            return (
                f"extrapolated to {times:.1f} times the largest RAM measured, {size_text(high)}: "
                "it holds if the pause goes on as a line"
            )
        if ram < low:
            return f"extrapolated below the smallest RAM measured, {size_text(low)}"
        return ""


def fit(points: Sequence[tuple[int, float]]) -> Model:
    """Fits the pauses in ms at sizes in bytes.  Raises ValueError for less than 3 of them."""
    if len(points) < 3:
        raise ValueError(f"{len(points)} pauses are too few for a model")
    sizes = [size / GIB for size, _ in points]
    pauses = [pause for _, pause in points]
    mean, level = fmean(sizes), fmean(pauses)
    variation = sum((size - mean) ** 2 for size in sizes)
    slope = 0.0
    if variation:
        products = ((s - mean) * (p - level) for s, p in zip(sizes, pauses, strict=True))
        slope = sum(products) / variation
    intercept = level - slope * mean
    residuals = (p - intercept - slope * s for s, p in zip(sizes, pauses, strict=True))
    freedom = len(points) - (2 if variation else 1)
    spread = math.sqrt(sum(each**2 for each in residuals) / freedom)
    found = tuple(sorted({size for size, _ in points}))
    return Model(intercept, slope, len(points), spread, mean, variation, found)


def fit_all(results: Sequence[Result]) -> dict[Series, Model]:
    """A model of each series that has enough pauses."""
    points: dict[Series, list[tuple[int, float]]] = {}
    for result in results:
        if not result.skipped:
            pairs = [(result.case.ram, pause) for pause in result.pauses]
            points.setdefault(result.case.series, []).extend(pairs)
    return {series: fit(pairs) for series, pairs in points.items() if len(pairs) >= 3}


def answer(models: dict[Series, Model], ram: int, wanted: Sequence[str | None]) -> str:
    """What an update of `ram` bytes will cost, by series; `wanted` has None where any will do.

    Raises ValueError, naming what there is, where nothing measured is like that.
    """
    lines = []
    for series, model in models.items():
        if any(want not in (None, part) for want, part in zip(wanted, series, strict=True)):
            continue
        mode, accel, pages, backing = series
        pause, width = model.predict(ram)
        lines.append(
            f"{mode}, {accel}, {pages} pages, {backing}: {max(0.0, pause):.2f} ms "
            f"± {width:.2f} ms (95 % of updates)"
        )
        lines.append(
            f"    {model.intercept:.2f} ms + {model.slope:.3f} ms per GiB, from {model.count} "
            f"updates at {', '.join(map(size_text, model.sizes))}"
        )
        if caution := model.caution(ram):
            lines.append(f"    {caution}")
    if not lines:
        known = ", ".join(" ".join(series) for series in models) or "nothing"
        raise ValueError(f"nothing of that kind was measured; there is: {known}")
    return "\n".join([f"Pause of one update of a guest with {size_text(ram)} of RAM:", *lines])
