"""What an evaluation found: rows of numbers, JSON-able and equal on every run; apart from them pictures and time.

A row is one way to reconstruct: a VAE, or a box average of the photos as a yardstick.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .latent_stats import LatentStats, LatentSums
from .metrics import Metric

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Check",
    "Comparison",
    "Evaluation",
    "Interval",
    "PhotoResult",
    "PhotoSize",
    "Plot",
    "ReconPictures",
    "Region",
    "Reject",
    "Row",
    "Speed",
    "photo_means",
]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number over photos and its bootstrap confidence interval."""

    value: float
    """The number, such as a mean over photos."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""

    @property
    def has_ends(self) -> bool:
        """Whether there is an interval: one photo, or a value that is not finite, has none."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row against another in one metric, photo by photo."""

    row: str
    """The row that is judged."""
    against: str
    """The row that it is compared with."""
    metric: str
    """Metric name."""
    difference: Interval
    """Mean over photos of the row's value minus the other's."""
    verdict: Literal["better", "worse", "not distinguishable"]
    """What the interval says: it lies on the better side of 0, on the worse side, or holds 0."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A metric over something else, one line a row: round trips, sizes, bits per pixel."""

    title: str
    """What the plot is about, such as `Repeated round trips`."""
    x_label: str
    """What is along x, with its unit."""
    metric: str
    """Metric name, along y."""
    lines: Mapping[str, tuple[tuple[float, float], ...]]
    """Row name to its (x, y) points, x ascending; one point is drawn as a mark."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question that was tried on a row, such as half precision against fp32 or tiled against untiled."""

    title: str
    """What was checked."""
    row: str
    """The row it was checked on."""
    facts: Mapping[str, str]
    """Name to value with unit."""
    passed: bool
    """Whether the stated bound holds."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """Parts of photos that a column of the data marks, such as faces or text, through one way of reconstruction."""

    label: str
    """What is marked: the column, or the label of its boxes."""
    row: str
    """The row that was measured."""
    num_regions: int
    """How many there are in all photos."""
    num_left_out: int
    """How many were too small for a metric, or outside of the central square."""
    means: Mapping[str, Interval]
    """Metric name to its mean over regions, with the interval over photos."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A photo that could not be read, or is too small for a metric."""

    name: str
    """Its name."""
    reason: str
    """Why, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class PhotoSize:
    """A photo as it was evaluated."""

    name: str
    """Its name, unique in the evaluation."""
    width: int
    """Pixels, after any resize."""
    height: int
    """Pixels, after any resize."""


@dataclass(frozen=True, kw_only=True)
class PhotoResult:
    """One photo through one way of reconstruction."""

    name: str
    """The photo's name."""
    metrics: Mapping[str, float]
    """Metric name to value."""
    latent_shape: tuple[int, ...] | None
    """(C, h, w) of its latents; None where there are none."""
    latents: LatentSums | None
    """What it adds to the row's latent statistics; None where there are no latents."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of reconstruction over all photos."""

    name: str
    """The model's name, or `32x32 box average`."""
    kind: Literal["vae", "codec", "box_average"]
    """What it is."""
    means: Mapping[str, float]
    """Metric name to its mean over photos."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Metric name to the same mean with its confidence interval."""
    pooled: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the whole set that are no means over photos, such as the pooled PSNR and rFID."""
    fingerprint: str | None = None
    """sha256 of the model's weights; None for yardsticks."""
    bits_per_pixel: float | None = None
    """What a codec spent, or what the raw latents would take at 16 bits a value."""
    latents: LatentStats | None
    """Statistics of its raw latents, pooled over photos; None where there are none."""
    photos: tuple[PhotoResult, ...]
    """Its photos, in the order of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class ReconPictures:
    """One photo through one way of reconstruction, to look at."""

    original: Image.Image
    """The photo as it was evaluated."""
    recon: Image.Image
    """Its reconstruction."""
    error: Image.Image
    """Heat map of the difference, see `eval.pictures.error_map`."""
    latent_channels: Image.Image | None
    """Each latent channel as a grey tile, side by side; None where there are no latents."""
    latent_colours: Image.Image | None
    """Three principal components of the latents as RGB; None below four channels."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How long one row took, encoding and decoding one photo at a time; measured, so different on every run."""

    seconds: float
    """Wall time over all photos."""
    photos_per_s: float
    """Photos a second."""
    megapixels_per_s: float
    """Million pixels a second."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything one call of `evaluate` found."""

    size: int | None
    """Side of the square that photos were brought to; None where they kept their size."""
    metrics: Mapping[str, Metric]
    """The metrics of every row, in the order of the columns."""
    photos: tuple[PhotoSize, ...]
    """What was evaluated."""
    rows: tuple[Row, ...]
    """Models in the order given, then baselines."""
    pictures: Mapping[str, Mapping[str, ReconPictures]] = field(default_factory=dict, repr=False)
    """Photo name to row name to pictures, for the first photos only."""
    speed: Mapping[str, Speed] = field(default_factory=dict)
    """Model name to how long it took."""
    protocol: Mapping[str, str] = field(default_factory=dict)
    """Name, version and every setting of the protocol, and the fingerprints of data and feature weights."""
    comparisons: tuple[Comparison, ...] = ()
    """The first row against every other, in every metric that has a direction."""
    plots: tuple[Plot, ...] = ()
    """Round trips, sizes, rates."""
    checks: tuple[Check, ...] = ()
    """Half precision and tiling, where asked for."""
    regions: tuple[Region, ...] = ()
    """Marked parts of photos, where asked for."""
    rejects: tuple[Reject, ...] = ()
    """Photos that could not be read; no row counts them."""

    def row(self, name: str) -> Row:
        """Return the row of a name; KeyError where there is none."""
        return {row.name: row for row in self.rows}[name]

    def best(self, metric: str) -> set[str]:
        """Return the names of the rows that are best in a metric, empty where it has no direction or one row only."""
        higher = self.metrics[metric].higher_is_better
        if higher is None or len(self.rows) < 2:
            return set()
        values = {row.name: row.means[metric] for row in self.rows}
        wanted = (max if higher else min)(values.values())
        return {name for name, value in values.items() if value == wanted}

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values for JSON, without pictures and without what was timed."""
        plain = dataclasses.asdict(dataclasses.replace(self, pictures={}, speed={}))
        del plain["pictures"], plain["speed"]
        for row in plain["rows"]:
            for photo in row["photos"]:
                del photo["latents"]
        return plain


def photo_means(photos: tuple[PhotoResult, ...]) -> dict[str, float]:
    """Return each metric's mean over photos, the same to the last bit in whatever order they come."""
    return {name: math.fsum(photo.metrics[name] for photo in photos) / len(photos) for name in photos[0].metrics}
