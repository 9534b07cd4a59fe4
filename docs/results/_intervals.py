"""Means over seeds, with intervals; differences are taken seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t as student


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: Over the seeds.
        error: Its standard error.
        seeds: How many.
    """

    mean: float
    error: float
    seeds: int

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval, by Student's t: 2.26 errors for ten seeds."""
        return float(student.ppf(0.975, self.seeds - 1)) * self.error

    def text(self, scale: float = 100.0, digits: int = 2, *, sign: bool = False) -> str:
        """The mean and half the width of its 95 % interval, in percent unless `scale` is given."""
        mean = f"{scale * self.mean:{'+' if sign else ''}.{digits}f}"
        if math.isnan(self.error):
            return mean
        return f"{mean} ± {scale * self.half:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed."""
    error = math.nan
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error, len(values))


def paired(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """The mean difference of two contenders that saw the same seeds, in the same order."""
    return estimate([a - b for a, b in zip(values, reference, strict=True)])
