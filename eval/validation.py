"""The evaluation inside a training: `evaluate` by a named protocol on validation photos, for log and model card.

A training calls a `Validator` with the weights that it would save. It is the evaluator of `sd-vae eval`, so a number in
a log, in a model card and in a report is one number. It never downloads: a metric whose network is not at hand, or that
does not fit the photos, is left out, and said once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sd_vae.data import Images
from sd_vae.latents.processes import Processes

from .evaluator import evaluate
from .features import has_weights
from .measures import build_measures
from .metrics import METRICS, MIN_SIZE
from .photos import numbered_photos
from .pictures import side_by_side, stacked
from .protocols import NETWORKS, Protocol, get_protocol
from .report import write_report
from .results import Evaluation

__all__ = ["Validated", "Validator"]

logger = logging.getLogger(__name__)

ROW = "VAE"
"""What the trained weights are called in a report."""

NUM_SHOWN = 4
"""Photos in the picture of a model card."""

SHOWN_SIDE = 256
"""Pixels of the longer side of a photo there."""


@dataclass(frozen=True)
class Validated:
    """What is found of the weights of a training."""

    values: Mapping[str, float]
    """Metric name to its mean over photos, or to the number of the whole set."""
    card: str
    """Protocol and numbers in Markdown."""
    picture: Image.Image | None
    """Photos, their reconstructions and where they differ; None without a report."""


class Validator:
    """Measures the weights of a training by a protocol.

    Args:
        protocol: Name of a protocol, or the protocol itself.
        size: Side in pixels of the central squares that are measured, where the protocol has no size of its own.
        weights: Network (vgg, alex, squeeze, inception) to the file of its weights, where it is not in the torch hub
            cache.

    Raises:
        UserError: No such protocol, or a network's weights are not what they should be.
    """

    def __init__(
        self, protocol: str | Protocol = "native", *, size: int, weights: Mapping[str, str] | None = None
    ) -> None:
        named = get_protocol(protocol)
        named = named if named.size is not None else get_protocol(named, size=size)
        self._weights = dict(weights or {})
        self._left_out = dict(_left_out(named, self._weights))
        kept = [name for name in named.metrics if name not in self._left_out]
        self.protocol = get_protocol(named, metrics=kept)
        build_measures(self.protocol, weights=self._weights)  # damaged weights show now, not hours later

    def __call__(
        self, vae: Any, photos: Images, *, processes: Processes | None = None, folder: Path | None = None
    ) -> Validated:
        """Return what is measured; every process calls it and takes its share of the photos.

        Args:
            vae: Model, left in the mode it came in.
            photos: Photos in their own size.
            processes: Those that train together.
            folder: Where the first process writes report.html, report.json and per_image.csv; None for no report.

        Raises:
            UserError: As `evaluate`.
        """
        processes = processes or Processes()
        found = numbered_photos(photos)
        protocol = self.protocol
        if found.num_photos < 2 and protocol.set_metrics:
            self._left_out |= dict.fromkeys(protocol.set_metrics, "it needs at least 2 photos")
            protocol = get_protocol(protocol, metrics=protocol.image_metrics)
        if self._left_out and processes.is_first:
            reasons = "; ".join(f"{name}: {why}" for name, why in self._left_out.items())
            logger.info("validation by %s leaves out %s", protocol.name, reasons)
        self._left_out = {}
        shown = 0 if folder is None else NUM_SHOWN
        evaluation = evaluate(
            {ROW: vae},
            found,
            protocol=protocol,
            weights=self._weights,
            codecs=() if folder is None else ("JPEG", "WebP"),
            max_pictures=shown,
            worst=shown,
            processes=processes,
        )
        if folder is not None and processes.is_first:
            card = _card(evaluation)
            write_report(folder, evaluation, title="Validation photos, after training", worst=shown)
            return Validated(_values(evaluation), card, _picture(evaluation))
        return Validated(_values(evaluation), _card(evaluation), None)


def _left_out(protocol: Protocol, weights: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(metric, why) of those that cannot be measured."""
    assert protocol.size is not None, "a validation brings its photos to one size"
    for name in protocol.metrics:
        net = NETWORKS.get(name)
        if net is not None and net not in weights and not has_weights(net):
            yield name, f"the weights of {net} are not in the torch hub cache"
        elif MIN_SIZE.get(name, 1) > protocol.size:
            yield name, f"it needs {MIN_SIZE[name]} pixels a side"


def _values(evaluation: Evaluation) -> dict[str, float]:
    """Every number of the trained weights, those of their latents included."""
    row = evaluation.row(ROW)
    latents = {} if row.latents is None else row.latents.values()
    return {**row.means, **row.pooled, **latents}


def _card(evaluation: Evaluation) -> str:
    """Protocol and numbers in Markdown."""
    stamp = evaluation.protocol
    rows = evaluation.rows
    names = [*evaluation.metrics, *rows[0].pooled]
    lines = [
        f"Reconstruction of {stamp['photos']} validation photos by protocol `{stamp['name']}`, version "
        f"{stamp['version']} (sd-vae eval; arrows point to better):",
        "",
        f"| mean over photos [95% interval] | {' | '.join(row.name for row in rows)} |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for name in names:
        metric = METRICS[name]
        cells = []
        for row in rows:
            value = {**row.means, **row.pooled}[name]
            interval = row.intervals.get(name)
            spread = ""
            if interval is not None and interval.has_ends:
                spread = f" [{metric.format(interval.low)}, {metric.format(interval.high)}]"
            cells.append(metric.format(value) + spread)
        lines.append(f"| {metric.heading} | {' | '.join(cells)} |")
    settings = [f"- {name}: {value}" for name, value in stamp.items() if name not in ("name", "version", "photos")]
    return "\n".join([*lines, "", "What the protocol says:", "", *settings, ""])


def _picture(evaluation: Evaluation) -> Image.Image:
    """The first photos, what comes back, and where it differs, one photo a line."""
    lines = []
    for rows in list(evaluation.pictures.values())[:NUM_SHOWN]:
        one = rows[ROW]
        pictures = [picture.copy() for picture in (one.original, one.recon, one.error)]
        for picture in pictures:
            picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        lines.append(side_by_side(pictures))
    return stacked(lines)
