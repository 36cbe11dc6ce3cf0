"""The report: one HTML file that opens anywhere offline, and the same numbers as JSON.

Pictures stand inside the page. Photos are shrunk and compressed for it (WebP) after everything was measured on the
originals; latents are kept to the pixel (PNG).
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from sd_vae.files import write_json, write_text

from . import curves as charts
from .metrics import METRICS
from .pictures import ERROR_CEILING
from .results import Evaluation

__all__ = ["REPORT_VERSION", "Figure", "Section", "write_report"]

REPORT_VERSION = 1
"""Version of the layout of report.json."""

MAX_SIDE = 768
"""Pixels; larger pictures are shrunk to this inside the page."""

QUALITY = 90
"""WebP quality of photos inside the page."""


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


def write_report(
    out_dir: Path,
    evaluation: Evaluation,
    *,
    title: str,
    summary: Sequence[str] = (),
    curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    sections: Sequence[Section] = (),
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write `report.html` and `report.json`, each whole or not at all.

    The same arguments give the same files, byte for byte: there is no date and no duration but what the caller passes.

    Args:
        out_dir: Folder, made where it is missing; a report in it is replaced.
        evaluation: What was measured; the page is about its first row, the others stand beside it.
        title: Heading.
        summary: Sentences under the heading.
        curves: Name to (step, value) points, such as losses.
        sections: Further parts, between the curves and the provenance.
        provenance: How the report came about: command, versions, seed, data.

    Raises:
        UserError: A curve is empty or not finite, or the folder cannot be written.
    """
    curves, provenance = curves or {}, provenance or {}
    environment = Environment(
        loader=PackageLoader("eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        evaluation=evaluation,
        primary=evaluation.rows[0],
        values_per_latent=_values_per_latent(evaluation),
        table_metrics=METRICS,
        latent_metrics=[name for name in METRICS if name not in evaluation.metrics],
        panels=[charts.panel(name, curve) for name, curve in curves.items()],
        charts=charts,
        sections=sections,
        provenance=provenance,
        error_ceiling=ERROR_CEILING,
        max_side=MAX_SIDE,
        quality=QUALITY,
        embed=_embed,
        embed_exactly=_embed_exactly,
    )
    numbers = {
        "format": "sd-vae report",
        "version": REPORT_VERSION,
        "title": title,
        "summary": list(summary),
        "evaluation": evaluation.to_dict(),
        "curves": {name: [list(point) for point in curve] for name, curve in curves.items()},
        "sections": [_section_to_dict(section) for section in sections],
        "provenance": dict(provenance),
    }
    write_text(Path(out_dir) / "report.html", page)
    write_json(Path(out_dir) / "report.json", numbers)


def _values_per_latent(evaluation: Evaluation) -> float | None:
    """How many pixel values one latent value of the first row stands for; None where that depends on the photo."""
    photo, shape = evaluation.photos[0], evaluation.rows[0].photos[0].latent_shape
    sizes = {(other.width, other.height) for other in evaluation.photos}
    return None if shape is None or len(sizes) > 1 else 3 * photo.width * photo.height / math.prod(shape)


def _section_to_dict(section: Section) -> dict[str, Any]:
    """A section as plain values."""
    return {
        "title": section.title,
        "text": list(section.text),
        "facts": dict(section.facts),
        "figures": [figure.caption for figure in section.figures],
    }


def _embed(picture: Image.Image) -> str:
    """A photo as a data URI, shrunk to `MAX_SIDE` and compressed."""
    if max(picture.size) > MAX_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return _data_uri(picture, "webp", quality=QUALITY, method=6)


def _embed_exactly(picture: Image.Image) -> str:
    """A small picture as a data URI, every pixel kept."""
    return _data_uri(picture, "png", optimize=True)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
