"""The figures that stand for many measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def student(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t distribution with `freedom` degrees of freedom.

    By the expansion about the normal quantile in powers of 1/freedom (Abramowitz and Stegun,
    26.7.5), which is exact to 1 % from 3 degrees on at 95 %.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
