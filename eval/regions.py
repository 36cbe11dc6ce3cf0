"""Marked parts of photos, measured apart: a mean over a photo hides what became of a face or a word.

Boxes and masks stand beside the pictures, in `metadata.jsonl` or in a column of the table: `box` is [left, top, right,
bottom] in pixels of the upright photo, `boxes` a list of such, `labels` their names; `mask` is the path of a picture
beside the photo, or its bytes, whose bright part is boxed.
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd_vae.data import Record
from sd_vae.errors import UserError
from sd_vae.images import open_image

from .compare import Bootstrap
from .measures import Measures
from .metrics import MIN_SIZE
from .photos import Photo, place
from .probes import Findings, Trial
from .results import Interval, Region

__all__ = ["Box", "Regions", "boxes_of"]

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, right and bottom outside."""

FITTING = ("psnr_db", "ssim", "l1", "ciede2000", "lpips_vgg", "lpips_alex", "lpips_squeeze")
"""Metrics that mean something on a part of a photo, each on the boxes that are large enough for it."""

COLUMNS = ("box", "boxes", "mask")
"""Columns that mark parts of a photo."""


class Regions:
    """Metrics of marked parts, by label.

    Args:
        measures: What is measured; of its metrics those that mean something on a part of a photo.
        size: The protocol's size, to which boxes are scaled with their photo.
    """

    def __init__(self, measures: Measures, size: int | None) -> None:
        self._measures = {name: function for name, function in measures.functions.items() if name in FITTING}
        self._size = size
        self._min_side = min((MIN_SIZE.get(name, 1) for name in self._measures), default=1)

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        """Return sums over one photo's boxes, by label, row and metric.

        Raises:
            UserError: A box is no box of the photo, or its mask cannot be read.
        """
        found: defaultdict[str, float] = defaultdict(float)
        for label, box in boxes_of(trial.photo, trial.original.size):
            scaled = self._scaled(box, trial.original.size)
            if scaled is None:
                found[f"{label}\n\nleft out"] += 1
                continue
            found[f"{label}\n\nnumber"] += 1
            x = trial.x.crop(scaled)
            fitting = {name: it for name, it in self._measures.items() if min(x.size) >= MIN_SIZE.get(name, 1)}
            for name, measure in fitting.items():
                found[f"{label}\n\n{name}"] += 1
                for row, recon in trial.recons.items():
                    found[f"{label}\n{row}\n{name}"] += measure(recon.crop(scaled), x)
        return found

    def conclude(self, found: Sequence[Mapping[str, float]]) -> Findings:
        """Return every label's means over boxes, with intervals over photos."""
        keys = dict.fromkeys(key for one in found for key in one)
        labels = sorted({key.split("\n")[0] for key in keys})
        regions = []
        for label in labels:
            rows = dict.fromkeys(key.split("\n")[1] for key in keys if key.startswith(f"{label}\n"))
            regions += [
                Region(
                    label=label,
                    row=row,
                    num_regions=_total(found, f"{label}\n\nnumber"),
                    num_left_out=_total(found, f"{label}\n\nleft out"),
                    means={
                        name: interval
                        for name in self._measures
                        for interval in _interval(found, f"{label}\n{row}\n{name}", f"{label}\n\n{name}")
                    },
                )
                for row in filter(None, rows)
            ]
        return Findings(regions=tuple(regions))

    def _scaled(self, box: Box, original: tuple[int, int]) -> Box | None:
        """A box where the photo was resized and cropped to; None where too little of it is left."""
        left, top, right, bottom = box
        if self._size is not None:
            placement = place((original[1], original[0]), self._size)
            (height, width), (crop_top, crop_left, *_) = placement.resized_size, placement.crop
            along = [round(edge * width / original[0]) - crop_left for edge in (left, right)]
            down = [round(edge * height / original[1]) - crop_top for edge in (top, bottom)]
            left, right = (min(max(edge, 0), self._size) for edge in along)
            top, bottom = (min(max(edge, 0), self._size) for edge in down)
        return (left, top, right, bottom) if min(right - left, bottom - top) >= self._min_side else None


def boxes_of(photo: Photo, size: tuple[int, int]) -> Iterator[tuple[str, Box]]:
    """Yield label and box of every marked part of a photo.

    Args:
        photo: With its columns.
        size: Its width and height.

    Raises:
        UserError: A box is not four numbers in order and inside the photo, labels and boxes differ in number, or a
            mask cannot be read or has another size.
    """
    columns = {name: _from_text(photo.columns.get(name)) for name in (*COLUMNS, "labels")}
    boxes = list(columns["boxes"] or [])
    labels = columns["labels"] or ["boxes"] * len(boxes)
    if len(labels) != len(boxes):
        raise UserError(f"{photo.name} has {len(boxes)} boxes and {len(labels)} labels; give one label a box.")
    for label, box in zip(labels, boxes, strict=True):
        yield str(label), _checked(photo.name, box, size)
    if columns["box"] is not None:
        yield "box", _checked(photo.name, columns["box"], size)
    if columns["mask"] is not None:
        yield from (("mask", box) for box in _box_of_mask(photo, columns["mask"], size))


def _from_text(value: Any) -> Any:
    """A cell of a CSV file that holds a list, as the list."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _checked(name: str, box: Any, size: tuple[int, int]) -> Box:
    """A box in whole pixels."""
    is_box = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
    left, top, right, bottom = (round(edge) if math.isfinite(edge) else -1 for edge in box) if is_box else (0, 0, 0, 0)
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise UserError(
            f"{name} of {size[0]}x{size[1]} pixels has the box {box}; it must be [left, top, right, bottom] inside the "
            "photo, in pixels."
        )
    return left, top, right, bottom


def _box_of_mask(photo: Photo, mask: Any, size: tuple[int, int]) -> Iterator[Box]:
    """The box around the bright part of a mask; nothing where it is dark."""
    content = mask.get("bytes") if isinstance(mask, Mapping) else mask if isinstance(mask, bytes) else None
    source: Path | io.BytesIO
    if content is not None:
        source = io.BytesIO(content)
    elif isinstance(mask, str) and isinstance(photo.source, Record):
        source = Path(photo.source.source).parent / mask
    else:
        raise UserError(
            f"{photo.name} has a mask of type {type(mask).__name__}; give a path beside the photo, or bytes."
        )
    picture: Image.Image = open_image(source, f"mask of {photo.name}").convert("L")
    if picture.size != size:
        raise UserError(
            f"{photo.name} has {size[0]}x{size[1]} pixels and its mask {picture.width}x{picture.height}; resize the "
            "mask."
        )
    rows, columns = np.nonzero(np.asarray(picture) >= 128)
    if len(rows):
        yield int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _interval(found: Sequence[Mapping[str, float]], values: str, number: str) -> Iterator[Interval]:
    """Yield the mean over photos of what was summed over their boxes; nothing where no box was large enough.

    A photo counts by the mean over its boxes: boxes of one photo are no independent evidence.
    """
    column = sorted(one[values] / one[number] for one in found if one.get(number))  # whatever order they came in
    if column:
        yield Bootstrap([f"{index:09}" for index in range(len(column))]).intervals({"it": column})["it"]


def _total(found: Sequence[Mapping[str, float]], key: str) -> int:
    return int(math.fsum(one.get(key, 0.0) for one in found))
