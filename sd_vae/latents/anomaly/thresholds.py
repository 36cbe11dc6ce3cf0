"""Where an alarm begins, how sure that is, and how well scores tell normal pictures from others.

A threshold is an order statistic of scores of normal pictures that the detector was not fitted to. What share of all
normal pictures lies above it then has a known distribution, whatever the scores are like: Beta(n + 1 - k, k) for the
k-th smallest of n. The same argument from the other side gives the interval that holds the true quantile.

Source: Vovk, "Conditional Validity of Inductive Conformal Predictors", arXiv 1209.2673, section 2; David and Nagaraja,
"Order Statistics", 2003, section 7.1; Newcombe, "Confidence Intervals for an Effect Size Measure Based on the
Mann-Whitney Statistic, Part 2", Statistics in Medicine 25, 2006, method 5, for the area under the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sd_vae.errors import UserError

__all__ = ["Detection", "Interval", "Threshold", "choose_threshold", "measure_detection"]

CONFIDENCE = 0.95
"""Of every interval."""


class Interval(NamedTuple):
    """A figure, and what holds the true one with 95% confidence."""

    value: float
    """The estimate."""
    low: float
    """Lower end."""
    high: float
    """Upper end; infinity where the pictures are too few to tell."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where an alarm begins: above `score`."""

    wanted_rate: float
    """Share of normal pictures that may raise an alarm."""
    score: Interval
    """The threshold, and the interval of the score that exactly `wanted_rate` of normal pictures exceed."""
    false_alarm_rate: Interval
    """Expected share of normal pictures above the threshold, and where the true share lies."""
    num_pictures: int
    """Normal pictures that it rests on."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well a score tells one kind of abnormal picture from normal ones."""

    auroc: Interval
    """Probability that an abnormal picture scores above a normal one, ties half; 0.5 is chance."""
    average_precision: float
    """Area under precision over recall; chance is the share of abnormal pictures."""
    num_normal: int
    """Normal pictures."""
    num_abnormal: int
    """Abnormal pictures."""


def choose_threshold(scores: Sequence[float], rate: float) -> Threshold:
    """Return the threshold that normal pictures exceed at a rate, from scores of normal pictures.

    It is the k-th smallest score with k = ceil((n + 1)(1 - rate)), so that a new normal picture lies above it with a
    probability of at most `rate`, over the choice of the n pictures and of the new one.

    Args:
        scores: Of normal pictures to which nothing was fitted, finite.
        rate: Wanted share of false alarms, above 0 and below 1.

    Raises:
        UserError: The rate is out of range, or too low for so few pictures.
    """
    from scipy import stats

    if not 0 < rate < 1:
        raise UserError(f"the false-alarm rate is {rate}, it must be above 0 and below 1; 0.05 is one picture in 20.")
    ordered, n = sorted(scores), len(scores)
    rank = math.ceil(round((n + 1) * (1 - rate), 9))  # without rounding, 0.95 * 20 would be above 19
    if rank > n:
        needed = math.ceil(round(1 / rate, 9)) - 1
        raise UserError(
            f"{n} normal pictures cannot show a false-alarm rate of {rate:g}; give at least {needed} to choose the "
            "threshold from, or a higher rate."
        )
    tail = (1 - CONFIDENCE) / 2
    # The quantile lies above the k-th smallest where fewer than k of n pictures lie below it.
    first = int(stats.binom.ppf(tail, n, 1 - rate))
    last = int(stats.binom.ppf(1 - tail, n, 1 - rate)) + 1
    share = stats.beta(n + 1 - rank, rank)
    return Threshold(
        wanted_rate=rate,
        score=Interval(
            ordered[rank - 1],
            ordered[first - 1] if first >= 1 else -math.inf,
            ordered[last - 1] if last <= n else math.inf,
        ),
        false_alarm_rate=Interval(float(share.mean()), float(share.ppf(tail)), float(share.ppf(1 - tail))),
        num_pictures=n,
    )


def measure_detection(normal: Sequence[float], abnormal: Sequence[float]) -> Detection:
    """Return how well a score tells abnormal pictures from normal ones.

    Args:
        normal: Scores of normal pictures, finite.
        abnormal: Scores of abnormal ones.

    Raises:
        UserError: There are none of either.
    """
    import torch
    from scipy import stats
    from torchmetrics.functional.classification import binary_average_precision

    m, n = len(abnormal), len(normal)
    if not m or not n:
        raise UserError(f"{n} normal and {m} abnormal pictures cannot be told apart; give some of both.")
    # Ranks, because torchmetrics squeezes scores outside of [0, 1] through a sigmoid, which makes ties of large ones.
    ranks = torch.from_numpy(stats.rankdata([*abnormal, *normal])).float() / (m + n)
    is_abnormal = torch.arange(m + n) < m
    auroc = float(stats.mannwhitneyu(abnormal, normal).statistic) / (m * n)
    return Detection(
        auroc=_area_interval(auroc, m, n),
        average_precision=float(binary_average_precision(ranks, is_abnormal.long())),
        num_normal=n,
        num_abnormal=m,
    )


def _area_interval(area: float, m: int, n: int) -> Interval:
    """An area under the curve with Newcombe's interval, which stays inside [0, 1] and has a width also at 0 and 1."""
    from scipy import optimize, stats

    reach, extra = float(stats.norm.ppf((1 + CONFIDENCE) / 2)), (m + n) / 2 - 1

    def excess(true: float) -> float:
        variance = true * (1 - true) * (1 + extra * (1 - true) / (2 - true) + extra * true / (1 + true)) / (m * n)
        return float((area - true) ** 2 - reach**2 * variance)

    beside = 1e-9  # at 0 and at 1 the area itself is a root, and the end that is looked for is the other one
    low = optimize.brentq(excess, 0.0, area - beside) if area > 0 else 0.0
    high = optimize.brentq(excess, area + beside, 1.0) if area < 1 else 1.0
    return Interval(area, float(low), float(high))
