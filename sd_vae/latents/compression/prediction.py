"""Whole numbers on a lattice, predicted from coarse to fine: what is already known says what comes next.

First every 32nd cell of every 32nd row is known, then the lattice is halved five times; each halving has three passes,
whose cells lie in the middle of four known ones. All cells of a pass are predicted at once, so that a picture is a few
dozen array operations, to code as well as to read. Everything is in whole numbers: what one machine writes, every other
one reads, whatever its arithmetic.

Shapes: C latent channels, h w latent cells, n cells of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COARSEST",
    "NUM_NEIGHBOURS",
    "NUM_STAGES",
    "ONE",
    "Cells",
    "Lattice",
    "Prediction",
    "fit_weights",
    "num_weights",
    "passes",
    "predict",
]

Whole = NDArray[np.int64]

COARSEST = 32
"""Cells between those that are known first."""

NUM_NEIGHBOURS = 4
"""Known cells around a cell that is predicted."""

NUM_STAGES = 4
"""Kinds of passes: the first cells, every pass but those of the last halving, and of that the first and the others."""

ONE = 16
"""Predictions are in sixteenths."""

WEIGHT_ONE = 64
"""Weights are in sixty-fourths, of one signed byte."""

LARGEST = 1 << 20
"""Predictions are cut off at this many sixteenths, so that weights from a damaged file cannot overflow."""

RIDGE = 4.0
"""Cells' worth of belief that the prediction is the neighbours' mean; decides where a picture is too small to tell."""


class Cells(NamedTuple):
    """The cells of one pass: rows and columns that form a grid."""

    stage: int
    """Below `NUM_STAGES`."""
    rows: slice
    """Their rows."""
    columns: slice
    """Their columns."""
    reach: int
    """Cells from each to its neighbours; 0 in the first pass, which has none."""
    is_diagonal: bool
    """The neighbours are at the corners; otherwise above, below and at the sides."""
    is_between_rows: bool
    """Of the neighbours that are not at corners, those above and below were known before those at the sides."""


@dataclass(frozen=True)
class Prediction:
    """What is known of one channel's cells of a pass before they are."""

    expected: Whole
    """(n,), sixteenths."""
    activity: Whole
    """(n,), sixteenths: how far off predictions are around here, and of other channels at this very cell."""


class Lattice:
    """Cells of all channels, those that are known so far, and by how much their predictions missed.

    Args:
        shape: C, h, w.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.values: NDArray[np.int32] = np.zeros(shape, np.int32)
        self.misses: NDArray[np.int32] = np.zeros(shape, np.int32)  # sixteenths

    def learn_(self, channel: int, cells: Cells, values: NDArray[np.int32], expected: Whole) -> None:
        """Take in the values (n,) of one channel's cells."""
        place = (channel, cells.rows, cells.columns)
        grid = self.values[place]
        grid[...] = values.reshape(grid.shape)
        self.misses[place] = (values * ONE - expected).reshape(grid.shape)


def passes(height: int, width: int) -> Iterator[Cells]:
    """Yield the passes over h x w cells in their order; each cell is in one of them."""
    whole = slice(0, None, COARSEST)
    yield Cells(0, whole, whole, 0, False, False)
    step = COARSEST
    while step > 1:
        half, stage = step // 2, 1 if step > 2 else 2
        old, new = slice(0, None, step), slice(half, None, step)
        last = NUM_STAGES - 1 if stage == 2 else 1
        for cells in (
            Cells(stage, new, new, half, True, False),
            Cells(last, new, old, half, False, True),
            Cells(last, old, new, half, False, False),
        ):
            if cells.rows.start < height and cells.columns.start < width:
                yield cells
        step = half


def num_weights(channel: int, stage: int) -> int:
    """Return how many weights predict a channel in a stage: its neighbours', and the channels' before it."""
    return channel + (NUM_NEIGHBOURS if stage else 0)


def predict(lattice: Lattice, channel: int, cells: Cells, weights: NDArray[np.int8]) -> Prediction:
    """Return what a channel's cells are expected to be.

    Args:
        lattice: With what was known before.
        channel: Which.
        cells: Of which pass.
        weights: `num_weights(channel, cells.stage)` of them.
    """
    features, activity = _features(lattice, channel, cells)
    total = weights.astype(np.int64) @ features if len(weights) else np.zeros(features.shape[1], np.int64)
    expected = (total + WEIGHT_ONE // 2) >> (WEIGHT_ONE.bit_length() - 1)
    return Prediction(expected.clip(-LARGEST, LARGEST), activity)


def fit_weights(lattice: Lattice, channel: int, stages: list[list[Cells]]) -> list[NDArray[np.int8]]:
    """Return the weights with the least squared misses for a channel, one array a stage.

    Args:
        lattice: With all values, and the misses of the channels before this one.
        channel: Which.
        stages: The passes of each stage.
    """
    found = []
    for stage, group in enumerate(stages):
        count = num_weights(channel, stage)
        belief = np.zeros(count)
        belief[: count - channel] = 1.0 / NUM_NEIGHBOURS
        gram, right = np.eye(count), belief.copy()
        scale = 0.0
        for cells in group:
            features = _features(lattice, channel, cells)[0].astype(np.float64)
            target = lattice.values[channel, cells.rows, cells.columns].reshape(-1) * float(ONE)
            scale += float(np.square(features).sum()) / max(features.size, 1)
            gram += features @ features.T
            right += features @ target
        gram += (RIDGE * scale) * np.eye(count)
        right += RIDGE * scale * belief
        solution = np.linalg.solve(gram, right) if count else belief
        found.append(np.rint(solution * WEIGHT_ONE).clip(-128, 127).astype(np.int8))
    return found


def _features(lattice: Lattice, channel: int, cells: Cells) -> tuple[Whole, Whole]:
    """What a prediction is a weighted sum of, (weights, n), and the activity (n,), in sixteenths."""
    count = lattice.values[channel, cells.rows, cells.columns].size
    others = lattice.misses[:channel, cells.rows, cells.columns].reshape(channel, count).astype(np.int64)
    if not cells.reach:
        return others, np.zeros(count, np.int64)
    values = _neighbours(lattice.values[channel], cells).astype(np.int64) * ONE
    missed = np.abs(_neighbours(lattice.misses[channel], cells).astype(np.int64))
    spread = values.max(axis=0) - values.min(axis=0)
    activity = (spread + missed.sum(axis=0)) >> 2
    if channel:
        activity = (activity + np.abs(others).sum(axis=0) // channel) >> 1
    return np.concatenate([values, others]), activity


def _neighbours(plane: NDArray[np.int32], cells: Cells) -> NDArray[np.int32]:
    """The four known cells around each cell, (4, n); what lies outside is the one opposite."""
    height, width = plane.shape
    rows, columns = np.arange(height)[cells.rows], np.arange(width)[cells.columns]
    above, left = rows - cells.reach, columns - cells.reach
    below, right = rows + cells.reach, columns + cells.reach
    below = np.where(below < height, below, above)
    right = np.where(right < width, right, left)
    if cells.is_diagonal:
        places = [(above, left), (above, right), (below, left), (below, right)]
    else:
        above, below = np.where(above < 0, below, above), np.where(below < 0, above, below)
        left, right = np.where(left < 0, right, left), np.where(right < 0, left, right)
        vertical, horizontal = [(above, columns), (below, columns)], [(rows, left), (rows, right)]
        if height <= cells.reach:
            vertical = horizontal
        if width <= cells.reach:
            horizontal = vertical
        places = vertical + horizontal if cells.is_between_rows else horizontal + vertical
    return np.stack([plane[np.ix_(down, across)].reshape(-1) for down, across in places])
