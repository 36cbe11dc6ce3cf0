"""A metric over something else, and a metric's spread over photos, as geometry for the page's inline SVG.

Drawn by the template, like the training curves, so that one file serves light and dark pages, any width and print.
Rows are told apart by colour and by the shape of their marks. Values that are not finite are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .codecs import EQUAL_BITS
from .curves import BOTTOM, HEIGHT, LEFT, LOG_RATIO, RIGHT, TOP, WIDTH, Axis, Tick
from .metrics import Metric
from .results import Evaluation, Interval, Plot

__all__ = ["Chart", "Distribution", "Line", "Strip", "chart", "distributions", "mark"]

MAX_DOTS = 200
"""Up to so many photos each photo is a dot; more are counted into a histogram."""

NUM_BINS = 48
"""Bars across a histogram."""

STRIP_HEIGHT = 54
"""SVG units from one row to the next."""

TOP_ROOM, TICK_ROOM = 36.0, 26.0
"""SVG units above the middle of the first row, and under the last row for the labels."""

STRIP_SPREAD = 9
"""SVG units that dots or bars reach from the middle of their row."""

MIN_SPAN = 0.2
"""x spans at least this part of its largest value, so that rates matched to a thousandth stand over each other."""

MAX_TICKS, MIN_TICK_GAP = 8, 36.0
"""Up to so many whole numbers along x are all marked, where so many SVG units lie between them."""

NUM_COLOURS = 6
"""Colours of rows in the style sheet; a seventh row has the first again, with another mark."""

MARKS = ((0, 0.0), (4, 45.0), (3, -90.0), (4, 0.0), (5, -90.0), (3, 90.0), (6, 0.0))
"""Corners of each mark and the direction of its first one in degrees; no corners are a circle."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row in a plot."""

    name: str
    """Row name."""
    colour: int
    """Number of its colour in the style sheet."""
    points: str
    """Points of a polyline."""
    marks: tuple[tuple[str, str], ...]
    """(path, words) of each point."""
    key: str
    """Path of its mark around the origin, for the legend."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot, ready to be drawn: `WIDTH` by `HEIGHT` SVG units."""

    title: str
    """What is drawn."""
    x_label: str
    """What is along x."""
    y_label: str
    """What is along y."""
    lines: tuple[Line, ...]
    """One a row."""
    x_ticks: tuple[Tick, ...]
    """Along x."""
    y_ticks: tuple[Tick, ...]
    """Along y."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The photos of one row in a distribution."""

    name: str
    """Row name."""
    colour: int
    """Number of its colour in the style sheet."""
    label_y: float
    """Where its name stands."""
    path: str
    """Dots or bars, one path."""
    mean: tuple[float, float, float] | None
    """x of the mean, and of the ends of its interval; None where it is not finite."""
    y: float
    """Middle of the strip."""
    words: str
    """The same for readers who do not see it."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A metric over photos, a strip a row: `WIDTH` by `height` SVG units."""

    title: str
    """Metric with its unit and direction."""
    height: float
    """SVG units."""
    strips: tuple[Strip, ...]
    """One a row."""
    ticks: tuple[Tick, ...]
    """Along x."""


def chart(plot: Plot, metric: Metric, evaluation: Evaluation) -> Chart:
    """Return a plot as geometry; x is logarithmic where it spans a wide range."""
    finite = {
        name: [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in plot.lines.items()
    }
    every = [point for points in finite.values() for point in points] or [(0.0, 0.0)]
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    slack = max(0.0, MIN_SPAN * abs(x_high) - (x_high - x_low)) / 2
    x_low, x_high = x_low - slack, x_high + slack
    y_low, y_high = min(y for _, y in every), max(y for _, y in every)
    room = 0.06 * (y_high - y_low)
    across = Axis(
        low=x_low,
        high=x_high,
        start=LEFT + 8,
        end=WIDTH - RIGHT,
        is_log=x_low > 0 and x_high / x_low >= LOG_RATIO,
        is_whole=all(x.is_integer() for x, _ in every),
    )
    up = Axis(low=y_low - room, high=y_high + room, start=HEIGHT - BOTTOM, end=TOP)
    order = [row.name.removesuffix(EQUAL_BITS) for row in evaluation.rows]
    lines = []
    for number, (name, points) in enumerate(finite.items()):
        row = name.removesuffix(EQUAL_BITS)  # a codec's curve has the colour of its row
        colour = order.index(row) if row in order else len(order) + number
        places = list(zip(across.place(_column(points, 0)), up.place(_column(points, 1)), strict=True))
        lines.append(
            Line(
                name=name,
                colour=colour % NUM_COLOURS,
                points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places),
                marks=tuple(
                    (mark(colour, *place), f"{name}: {metric.format(y)} at {x:.4g}")
                    for place, (x, y) in zip(places, points, strict=True)
                ),
                key=mark(colour, 0.0, 0.0, size=6.0),
            )
        )
    return Chart(
        title=plot.title,
        x_label=plot.x_label + (" (log scale)" if across.is_log else ""),
        y_label=metric.heading,
        lines=tuple(lines),
        x_ticks=_ticks_at(across, sorted({x for x, _ in every})),
        y_ticks=up.ticks(),
    )


def distributions(evaluation: Evaluation) -> list[Distribution]:
    """Return each metric's spread over photos; none where there is one photo."""
    if len(evaluation.photos) < 2:
        return []
    found = []
    for name, metric in evaluation.metrics.items():
        columns = [np.array([photo.metrics[name] for photo in row.photos]) for row in evaluation.rows]
        finite = np.concatenate([column[np.isfinite(column)] for column in columns])
        if not len(finite):
            continue
        across = Axis(low=float(finite.min()), high=float(finite.max()), start=RIGHT, end=WIDTH - RIGHT)
        strips = []
        for number, (row, column) in enumerate(zip(evaluation.rows, columns, strict=True)):
            y = STRIP_HEIGHT * number + TOP_ROOM
            values = column[np.isfinite(column)]
            mean = row.intervals.get(name) or Interval(value=row.means[name], low=row.means[name], high=row.means[name])
            ends = (mean.value, mean.low, mean.high)
            strips.append(
                Strip(
                    name=row.name,
                    colour=number % NUM_COLOURS,
                    label_y=y - STRIP_SPREAD - 9,
                    path=_dots(across.place(values), y) if len(values) <= MAX_DOTS else _bars(across, values, y),
                    mean=_three(across.place(np.array(ends))) if np.isfinite(ends).all() else None,
                    y=y,
                    words=_words(row.name, metric, values, mean),
                )
            )
        height = STRIP_HEIGHT * len(strips) + TICK_ROOM
        found.append(Distribution(title=metric.heading, height=height, strips=tuple(strips), ticks=across.ticks()))
    return found


def mark(number: int, x: float, y: float, size: float = 4.5) -> str:
    """Return the path of a row's mark: a circle, a square, a triangle, and so on, by the row's number."""
    corners, first = MARKS[number % len(MARKS)]
    if not corners:
        return f"M{x - size:.1f},{y:.1f}a{size},{size} 0 1 0 {2 * size},0a{size},{size} 0 1 0 {-2 * size},0z"
    angles = (math.radians(first) + math.tau * corner / corners for corner in range(corners))
    radius = 1.25 * size  # a polygon inside a circle looks smaller than the circle
    return "M" + "L".join(f"{x + radius * math.cos(a):.1f},{y + radius * math.sin(a):.1f}" for a in angles) + "z"


def _ticks_at(across: Axis, values: Sequence[float]) -> tuple[Tick, ...]:
    """Ticks at whole numbers that were tried, such as sizes, where they are few and apart; else at round values."""
    if not across.is_whole or not 2 <= len(values) <= MAX_TICKS:
        return across.ticks()
    places = across.place(np.array(values)).tolist()
    if min(right - left for left, right in itertools.pairwise(places)) < MIN_TICK_GAP:
        return across.ticks()
    return tuple(Tick(round(place, 1), f"{value:.0f}") for place, value in zip(places, values, strict=True))


def _column(points: Sequence[tuple[float, float]], index: int) -> np.ndarray:
    return np.array([point[index] for point in points], np.float64)


def _three(values: np.ndarray) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _dots(x: np.ndarray, y: float) -> str:
    """A dot a photo, spread up and down by its position, so that equal values stay apart."""
    golden = (np.arange(len(x)) * 0.618034) % 1.0
    places = zip(x, y + STRIP_SPREAD * (2 * golden - 1), strict=True)
    return "".join(f"M{a - 2.5:.1f},{b:.1f}a2.5,2.5 0 1 0 5,0a2.5,2.5 0 1 0 -5,0z" for a, b in places)


def _bars(across: Axis, values: np.ndarray, y: float) -> str:
    """A histogram; the tallest bar is as high as the strip."""
    counts, edges = np.histogram(values, bins=NUM_BINS, range=(across.low, across.high))
    places = across.place(edges)
    heights = 2 * STRIP_SPREAD * counts / counts.max()
    return "".join(
        f"M{left:.1f},{y + STRIP_SPREAD:.1f}V{y + STRIP_SPREAD - high:.1f}H{right:.1f}V{y + STRIP_SPREAD:.1f}z"
        for left, right, high in zip(places[:-1], places[1:], heights, strict=True)
        if high
    )


def _words(name: str, metric: Metric, values: np.ndarray, mean: Interval) -> str:
    """A strip in words."""
    spread = f", photos from {metric.format(values.min())} to {metric.format(values.max())}" if len(values) else ""
    return f"{name}: mean {metric.format(mean.value)}{spread}"
