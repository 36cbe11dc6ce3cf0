"""The page of a report: what its templates are given, and the pictures inside it.

One HTML file with its style, its script and its pictures inside. Its content security policy forbids everything that is
not in the file, so it cannot load anything and no text from a data set can run. Photos are shrunk and compressed for it
(WebP) after everything was measured on the originals; latents are kept to the pixel (PNG). The viewer shows pictures
that the page has anyway. Without scripts the page has all numbers and pictures, and no viewer.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from . import curves as charts
from . import plots
from .compare import MIN_PHOTOS
from .metrics import METRICS, Metric
from .pictures import ERROR_CEILING
from .results import Comparison, Evaluation, Interval

__all__ = ["Figure", "Section", "render"]

MAX_SIDE = 768
"""Pixels; larger pictures are shrunk to this inside the page."""

THUMB_SIDE = 320
"""The same for the gallery of worst photos."""

QUALITY = 90
"""WebP quality of photos inside the page."""

NUM_HEADLINES = 4
"""So many of the metrics stand in the heading and beside pictures; the tables have all."""

MAX_TABLE_ROWS = 3000
"""The table of photos holds no more lines than this; a browser sorts so many without a pause."""

VERDICTS: tuple[Literal["better", "worse", "not distinguishable"], ...] = ("better", "worse", "not distinguishable")
"""In the order in which they are told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with words under it."""

    picture: Image.Image
    """Shown at most 768 pixels wide or high."""
    caption: str
    """What it shows, also for readers who do not see it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report that its writer adds: words, facts, pictures."""

    title: str
    """Heading."""
    text: Sequence[str] = ()
    """Paragraphs."""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name to value, shown as a list."""
    figures: Sequence[Figure] = ()
    """Pictures; the JSON has their captions."""


def render(
    evaluation: Evaluation,
    *,
    title: str,
    summary: Sequence[str],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    sections: Sequence[Section],
    provenance: Mapping[str, str],
    worst: int,
    worst_by: str | None,
) -> str:
    """Return the page as HTML; see `eval.report.write_report` for what goes in.

    Raises:
        UserError: A curve is empty or not finite.
    """
    environment = _environment()
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "report.js")[0]  # not a template: braces are JavaScript's
    worst_first = _worst_first(evaluation, worst_by)
    num_listed = max(1, MAX_TABLE_ROWS // len(evaluation.rows))
    return environment.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        evaluation=evaluation,
        primary=evaluation.rows[0],
        values_per_latent=_values_per_latent(evaluation),
        metric_of=lambda name: _metric(evaluation, name),
        pooled_metrics=list(dict.fromkeys(name for row in evaluation.rows for name in row.pooled)),
        latent_metrics=list(
            dict.fromkeys(name for row in evaluation.rows if row.latents for name in row.latents.values())
        ),
        region_metrics=list(dict.fromkeys(name for region in evaluation.regions for name in region.means)),
        min_photos=MIN_PHOTOS,
        verdicts=list(_verdicts(evaluation)),
        signed=_signed,
        listed=sorted(worst_first[:num_listed]),
        worst=worst_first[:worst] if worst_by and len(evaluation.photos) > 1 else [],
        worst_by=worst_by,
        num_headlines=NUM_HEADLINES,
        max_dots=plots.MAX_DOTS,
        distributions=plots.distributions(evaluation),
        plots=[plots.chart(plot, _metric(evaluation, plot.metric), evaluation) for plot in evaluation.plots],
        panels=[charts.panel(name, curve) for name, curve in curves.items()],
        charts=charts,
        sections=sections,
        provenance=provenance,
        error_ceiling=ERROR_CEILING,
        max_side=MAX_SIDE,
        quality=QUALITY,
        embed=_embed,
        embed_thumb=lambda picture: _embed(picture, THUMB_SIDE),
        embed_exactly=_embed_exactly,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


@functools.cache
def _environment() -> Environment:
    """The templates; compiled once."""
    return Environment(
        loader=PackageLoader("eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _metric(evaluation: Evaluation, name: str) -> Metric:
    """How a number is printed; one that no table knows goes by its own name."""
    return evaluation.metrics.get(name) or METRICS.get(name) or Metric(label=name, digits=4, about="")


def _values_per_latent(evaluation: Evaluation) -> float | None:
    """How many pixel values one latent value of the first row stands for; None where that depends on the photo."""
    photo, shape = evaluation.photos[0], evaluation.rows[0].photos[0].latent_shape
    sizes = {(other.width, other.height) for other in evaluation.photos}
    return None if shape is None or len(sizes) > 1 else 3 * photo.width * photo.height / math.prod(shape)


def _worst_first(evaluation: Evaluation, name: str | None) -> list[int]:
    """Positions of the photos, the first row's worst in a metric first, NaN last; in their order without a metric."""
    positions = range(len(evaluation.photos))
    if name is None:
        return list(positions)
    values = [photo.metrics[name] for photo in evaluation.rows[0].photos]
    sign = 1.0 if evaluation.metrics[name].higher_is_better else -1.0
    return sorted(positions, key=lambda index: (math.isnan(values[index]), sign * values[index]))


def _verdicts(evaluation: Evaluation) -> Iterator[tuple[str, str, dict[str, list[Comparison]]]]:
    """(row, against, verdict to comparisons) of every pair of rows that was compared."""
    for row, against in dict.fromkeys((found.row, found.against) for found in evaluation.comparisons):
        pair = [found for found in evaluation.comparisons if (found.row, found.against) == (row, against)]
        grouped = {verdict: [found for found in pair if found.verdict == verdict] for verdict in VERDICTS}
        yield row, against, {verdict: found for verdict, found in grouped.items() if found}


def _signed(metric: Metric, difference: Interval) -> str:
    """A difference with its sign and its interval, such as `+1.20 dB (0.80 to 1.60)`."""
    sign = "+" if difference.value > 0 else ""
    unit = f" {metric.unit}" if metric.unit else ""
    return (
        f"{sign}{metric.format(difference.value)}{unit} "
        f"({metric.format(difference.low)} to {metric.format(difference.high)})"
    )


def _embed(picture: Image.Image, max_side: int = MAX_SIDE) -> str:
    """A photo as a data URI, shrunk to `max_side` and compressed."""
    if max(picture.size) > max_side:
        picture = picture.copy()
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return _data_uri(picture, "webp", quality=QUALITY)


def _embed_exactly(picture: Image.Image) -> str:
    """A small picture as a data URI, every pixel kept."""
    return _data_uri(picture, "png", optimize=True)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
