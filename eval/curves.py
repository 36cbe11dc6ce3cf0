"""Training curves as geometry: what a template needs to draw small line charts that follow the page's colours.

Drawn as inline SVG by the report's template instead of by a plotting library, so that one file serves light and dark
pages, any width and print. Tick positions come from matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sd_vae.errors import UserError

__all__ = ["HEIGHT", "WIDTH", "Axis", "Panel", "Tick", "panel"]

WIDTH, HEIGHT = 480, 250
"""Size of a panel in SVG units."""

LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 28
"""Margins around the plotted area."""

MAX_POINTS = 400
"""Longer curves are drawn as the means of this many stretches."""

LOG_RATIO = 20.0
"""A curve of positive values whose largest is this many times its smallest gets a logarithmic axis."""

SMOOTHING = 0.05
"""The running mean spans this part of the curve."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    """SVG units."""
    label: str
    """The value there."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values to SVG units along one direction."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    start: float
    """Where `low` is drawn."""
    end: float
    """Where `high` is drawn."""
    is_log: bool = False
    """Equal ratios are equal lengths; `low` is above 0."""
    is_whole: bool = False
    """Ticks stand at whole numbers only."""

    def place(self, values: np.ndarray) -> np.ndarray:
        """Return where values are drawn; a range of no length is drawn in the middle."""
        low, high, values = (np.log10(v) if self.is_log else np.asarray(v) for v in (self.low, self.high, values))
        share = (values - low) / (high - low) if high > low else np.full_like(values, 0.5, dtype=np.float64)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> tuple[Tick, ...]:
        """Return a few round values inside the range and where they are drawn."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        locator = LogLocator(subs=(1.0, 2.0, 5.0)) if self.is_log else MaxNLocator(nbins=5, integer=self.is_whole)
        values = np.asarray(locator.tick_values(self.low, self.high), np.float64)
        values = values[(values >= self.low) & (values <= self.high)]
        if self.is_log and len(values) > 6:
            values = values[np.isclose(np.log10(values) % 1.0, 0.0)]  # powers of ten only
        return tuple(Tick(round(float(at), 1), f"{v:.4g}") for v, at in zip(values, self.place(values), strict=True))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One curve, ready to draw."""

    title: str
    """What is drawn."""
    first: str
    """Value at the first step."""
    last: str
    """Running mean at the last step."""
    is_log: bool
    """The vertical axis is logarithmic."""
    raw: str
    """Points of a polyline through the values as logged."""
    smooth: str
    """Points of a polyline through their running mean."""
    x_ticks: tuple[Tick, ...]
    """Steps."""
    y_ticks: tuple[Tick, ...]
    """Values."""


def panel(title: str, curve: Sequence[tuple[int, float]]) -> Panel:
    """Return a curve of (step, value) as geometry.

    Raises:
        UserError: The curve is empty, or holds a value that is not finite.
    """
    if not curve:
        raise UserError(f"the curve {title!r} has no points; leave it out or log it at least once.")
    steps, values = (np.asarray(column, np.float64) for column in zip(*sorted(curve), strict=True))
    if not np.isfinite(values).all():
        step = int(steps[~np.isfinite(values)][0])
        raise UserError(f"the curve {title!r} is not finite at step {step}; lower the learning rate of that run.")
    chunks = np.array_split(np.arange(len(values)), min(len(values), MAX_POINTS))
    x = np.array([steps[chunk].mean() for chunk in chunks])
    y = np.array([values[chunk].mean() for chunk in chunks])
    smooth = _running_mean(y)
    is_log = bool(y.min() > 0 and y.max() / y.min() >= LOG_RATIO)
    across = Axis(low=float(x[0]), high=float(x[-1]), start=LEFT, end=WIDTH - RIGHT)
    up = Axis(low=float(y.min()), high=float(y.max()), start=HEIGHT - BOTTOM, end=TOP, is_log=is_log)
    return Panel(
        title=title,
        first=f"{values[0]:.4g}",
        last=f"{smooth[-1]:.4g}",
        is_log=is_log,
        raw=_points(across.place(x), up.place(y)),
        smooth=_points(across.place(x), up.place(smooth)),
        x_ticks=across.ticks(),
        y_ticks=up.ticks(),
    )


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the stretch around each value; shorter at the ends."""
    window = np.ones(max(1, round(len(values) * SMOOTHING)))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _points(x: np.ndarray, y: np.ndarray) -> str:
    """SVG's notation of a polyline."""
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
