"""Is one way of reconstruction better than another? Paired bootstrap over photos, and a verdict in plain words.

Photos are drawn with replacement, the same draws for all rows and metrics, so that a hard photo is hard for all of
them and differences are told apart that the spread over photos would hide. Intervals are percentiles, widened for few
photos. The draws depend on the photos' names alone: order, processes and other rows change nothing.

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Hesterberg, "What Teachers Should Know about
the Bootstrap", arXiv 1411.5279, section 5.3 (the expanded percentile interval).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from .metrics import Metric, pooled_psnr_db
from .results import Comparison, Interval

__all__ = ["CONFIDENCE", "MIN_PHOTOS", "RESAMPLES", "Bootstrap", "verdict"]

RESAMPLES = 2000
"""Draws of as many photos as there are."""

CONFIDENCE = 0.95
"""Of every interval."""

MIN_PHOTOS = 6
"""Below this nothing is told apart: five coin tosses that agree are no evidence at 95% (2 * 2^-5 > 0.05)."""

CHUNK = 64
"""Draws that are held in memory at once."""


class Bootstrap:
    """Draws of photos, and the intervals that follow from them.

    Args:
        names: Names of the photos, in the order of the values.
        seed: Of the draws.
    """

    def __init__(self, names: Sequence[str], seed: int = 0) -> None:
        self._order = np.argsort(np.array(names), kind="stable")
        self._seed = seed

    def means(self, values: np.ndarray) -> np.ndarray:
        """Return the means over the drawn photos, (resamples, columns), of values (photos, columns)."""
        sorted_values = np.asarray(values, np.float64)[self._order]
        num = len(sorted_values)
        rng = np.random.default_rng(self._seed)
        found = []
        for start in range(0, RESAMPLES, CHUNK):
            drawn = rng.integers(0, num, (min(CHUNK, RESAMPLES - start), num))
            counts = np.stack([np.bincount(row, minlength=num) for row in drawn])
            found.append(counts @ sorted_values / num)
        return np.concatenate(found)

    def intervals(self, columns: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
        """Return the mean of each column over photos with its interval.

        Args:
            columns: Values by name, one a photo. A column with an infinite value, or of one photo, has an interval
                without ends.
        """
        values = {name: np.asarray(column, np.float64) for name, column in columns.items()}
        bounded = [name for name, column in values.items() if np.isfinite(column).all() and len(column) > 1]
        means = {name: math.fsum(column) / len(column) for name, column in columns.items()}
        unbounded = {name: Interval(value=mean, low=-math.inf, high=math.inf) for name, mean in means.items()}
        if not bounded:
            return unbounded
        drawn = self.means(np.stack([values[name] for name in bounded], axis=1))
        lows, highs = np.quantile(drawn, _levels(len(self._order)), axis=0)
        return unbounded | {
            name: Interval(value=means[name], low=float(low), high=float(high))
            for name, low, high in zip(bounded, lows, highs, strict=True)
        }

    def pooled_psnr(self, psnrs_db: Sequence[float]) -> Interval:
        """Return the pooled PSNR in dB with its interval; without ends where a photo is perfect, or the only one."""
        value = pooled_psnr_db(psnrs_db)
        errors = np.array([10.0 ** (-psnr / 10.0) for psnr in psnrs_db])
        found = self.intervals({"error": errors.tolist()})["error"]
        if not errors.all() or math.isinf(found.high):
            return Interval(value=value, low=-math.inf, high=math.inf)
        return Interval(value=value, low=-10.0 * math.log10(found.high), high=-10.0 * math.log10(found.low))

    def compare(
        self,
        row: str,
        values: Mapping[str, Sequence[float]],
        against: str,
        others: Mapping[str, Sequence[float]],
        metrics: Mapping[str, Metric],
    ) -> list[Comparison]:
        """Return one row against another in every metric that has a direction.

        Args:
            row: Name of the row that is judged.
            values: Its values by metric, one a photo.
            against: Name of the other row.
            others: The other row's values.
            metrics: How the metrics are read.
        """
        judged = {name: metric.higher_is_better for name, metric in metrics.items()}
        differences = {
            # Equal infinities, as of two perfect reconstructions, do not differ.
            name: [0.0 if a == b else a - b for a, b in zip(values[name], others[name], strict=True)]
            for name, better in judged.items()
            if better is not None
        }
        num = len(self._order)
        return [
            Comparison(
                row=row,
                against=against,
                metric=name,
                difference=difference,
                verdict=verdict(difference, num, higher_is_better=bool(judged[name])),
            )
            for name, difference in self.intervals(differences).items()
        ]


def verdict(
    difference: Interval, num_photos: int, *, higher_is_better: bool
) -> Literal["better", "worse", "not distinguishable"]:
    """Return what an interval of differences says of the row that is judged."""
    if num_photos < MIN_PHOTOS or difference.low <= 0.0 <= difference.high:
        return "not distinguishable"
    return "better" if (difference.low > 0.0) == higher_is_better else "worse"


def _levels(num_photos: int) -> tuple[float, float]:
    """Quantiles of the drawn means: those of the normal at which Student's t would put the ends."""
    from scipy import stats

    reach = math.sqrt(num_photos / (num_photos - 1)) * stats.t.ppf((1.0 + CONFIDENCE) / 2.0, num_photos - 1)
    low = float(stats.norm.cdf(-reach))
    return low, 1.0 - low
