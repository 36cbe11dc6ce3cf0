"""`write_report`: one HTML file that opens anywhere offline, the same numbers as JSON, and every photo's as CSV.

The three are written from one `Evaluation`, whole or not at all, and are equal for equal evaluations: no date, no
duration and no random name is in them. What the page looks like is in `eval.page`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_vae.errors import UserError
from sd_vae.files import write_json, write_text

from . import page
from .page import Figure, Section
from .results import Evaluation

__all__ = ["OWN", "REPORT_VERSION", "Figure", "Section", "write_report"]

REPORT_VERSION = 1
"""Version of the layout of report.json."""

OWN = ("report.html", "report.json", "per_image.csv")
"""The files that `write_report` writes."""


def write_report(
    out_dir: Path,
    evaluation: Evaluation,
    *,
    title: str,
    summary: Sequence[str] = (),
    curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    sections: Sequence[Section] = (),
    provenance: Mapping[str, str] | None = None,
    worst: int = 6,
    worst_by: str | None = None,
) -> None:
    """Write `report.html`, `report.json` and `per_image.csv`, each whole or not at all.

    The same arguments give the same files, byte for byte: there is no date and no duration but what the caller passes.

    Args:
        out_dir: Folder, made where it is missing; a report in it is replaced.
        evaluation: What was measured; the page is about its first row, the others stand beside it.
        title: Heading.
        summary: Sentences under the heading.
        curves: Name to (step, value) points, such as losses.
        sections: Further parts, between the curves and the provenance.
        provenance: How the report came about: command, versions, seed, data.
        worst: How many of the first row's worst photos stand in a gallery; 0 for none.
        worst_by: Metric that says which are worst; None takes the first one that has a direction.

    Raises:
        UserError: A curve is empty or not finite, `worst` is below 0, `worst_by` is no metric of the evaluation with a
            direction, or the folder cannot be written.
    """
    curves, provenance = curves or {}, provenance or {}
    if worst < 0:
        raise UserError(f"worst is {worst} photos, it must be at least 0; 0 leaves the gallery out.")
    html = page.render(
        evaluation,
        title=title,
        summary=summary,
        curves=curves,
        sections=sections,
        provenance=provenance,
        worst=worst,
        worst_by=_worst_by(evaluation, worst_by),
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
    write_text(Path(out_dir) / "report.html", html)
    write_text(Path(out_dir) / "per_image.csv", per_image_csv(evaluation))
    write_json(Path(out_dir) / "report.json", numbers)


def per_image_csv(evaluation: Evaluation) -> str:
    """Return one line per photo and row: `photo`, `row`, `width`, `height`, then a column per metric.

    Numbers have all their digits; infinity, such as the PSNR of equal pictures, is `inf`.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["photo", "row", "width", "height", *evaluation.metrics])
    for index, photo in enumerate(evaluation.photos):
        for row in evaluation.rows:
            metrics = row.photos[index].metrics
            values = [repr(float(metrics[name])) for name in evaluation.metrics]
            writer.writerow([photo.name, row.name, photo.width, photo.height, *values])
    return table.getvalue()


def _worst_by(evaluation: Evaluation, name: str | None) -> str | None:
    """The metric that ranks photos, checked; None where no metric has a direction."""
    ranking = [key for key, metric in evaluation.metrics.items() if metric.higher_is_better is not None]
    if name is None:
        return next(iter(ranking), None)
    if name not in ranking:
        raise UserError(f"photos cannot be ranked by {name!r}; choose one of: {', '.join(ranking)}.")
    return name


def _section_to_dict(section: Section) -> dict[str, Any]:
    """A section as plain values."""
    return {
        "title": section.title,
        "text": list(section.text),
        "facts": dict(section.facts),
        "figures": [figure.caption for figure in section.figures],
    }
