"""Defects painted into normal pictures, so that a network can learn what a defect is without having seen a real one.

Lines, blur, noise, and parts of other pictures or of the same one, in shapes and strengths that vary widely: what is to
be learned is that a part does not belong, not how one kind of defect looks.

Source: the idea of Li et al., "CutPaste", arXiv 2104.04015, and of Schlueter et al., "Natural Synthetic Anomalies for
Self-Supervised Anomaly Detection and Localization", arXiv 2109.15222.

Shapes: K kinds of defects, H W pixels. Pictures are (H, W, 3) in levels 0 to 255, masks (H, W) from 0 to 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["KINDS", "Kind", "Painted", "paint"]

Kind = Literal["lines", "blur", "noise", "patch"]
KINDS: tuple[Kind, ...] = ("lines", "blur", "noise", "patch")
"""What is told apart; a patch comes from another picture or from another place in the same one."""

MAX_DEFECTS = 2
"""In one picture."""
LEAST_SIDE, LARGEST_SIDE = 20, 80
"""Pixels of the side of what is painted, as a square of its area; never more than the picture has."""
CHANCES = {"lines": 0.25, "blur": 0.15, "noise": 0.1, "foreign": 0.4, "moved": 0.1}
"""How often each is painted; foreign and moved are the two sources of a patch."""
EDGE, INSIDE = 3.0, 0.93
"""Pixels of the blur of a patch's mask, and what it comes to well inside: more than about 4 pixels from the edge."""
LEAST_CHANGE, CHANGE_WINDOW = 2.0, 9
"""Levels by which pixels change at least, on average over a window of so many pixels, where a defect counts."""
OVERSAMPLING = 4
"""Lines are drawn so many times larger and averaged down."""


class Painted(NamedTuple):
    """A picture, and where what is wrong with it."""

    x: np.ndarray
    """(H, W, 3), uint8."""
    masks: np.ndarray
    """(K, H, W), float32; 0 where a defect leaves the picture nearly as it was."""
    inside: np.ndarray
    """(H, W), bool: well inside of a patch, where nothing but its surroundings tells that it does not belong."""


def paint(x: np.ndarray, donor: np.ndarray, rng: Generator) -> Painted:
    """Return a picture with one or two defects, and where they can be seen.

    Args:
        x: Normal picture, uint8.
        donor: One of any size, from which parts are taken, uint8.
        rng: Decides everything.
    """
    from scipy.ndimage import gaussian_filter

    painted, inside = x.astype(np.float32), np.zeros(x.shape[:2], bool)
    masks = np.zeros((len(KINDS), *x.shape[:2]), np.float32)
    for _ in range(rng.integers(1, MAX_DEFECTS + 1)):
        kind = rng.choice(list(CHANCES), p=list(CHANCES.values()))
        if kind == "lines":
            after, where = _lines(painted, rng)
        elif kind == "blur":
            after, where = _blur(painted, rng)
        elif kind == "noise":
            after, where = _noise(painted, rng)
        else:
            after, where = _patch(painted, donor.astype(np.float32) if kind == "foreign" else painted, rng)
        after = after.clip(0.0, 255.0)
        is_changed = _is_changed(painted, after)
        if kind in ("foreign", "moved"):
            inside |= is_changed & (gaussian_filter((where > 0.5).astype(np.float32), EDGE) > INSIDE)
        mask = masks[KINDS.index(kind if kind in KINDS else "patch")]
        np.maximum(mask, where * is_changed, out=mask)
        painted = after
    return Painted(np.rint(painted).astype(np.uint8), masks, inside)


def _is_changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where a defect can be seen, (H, W): a blurred blue sky is still the sky, and nothing to be learned from."""
    from scipy.ndimage import uniform_filter

    return uniform_filter(np.abs(after - before).mean(axis=2), CHANGE_WINDOW) > LEAST_CHANGE


def _lines(x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Thin lines, straight or bent, of any colour."""
    from PIL import Image, ImageDraw

    height, width = x.shape[:2]
    canvas = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    thickness = max(1, round(OVERSAMPLING * rng.uniform(1.0, 2.5)))
    along = np.linspace(-0.5, 0.5, 9)
    for _ in range(rng.integers(1, 4)):
        length, angle = rng.uniform(LEAST_SIDE, 2 * LARGEST_SIDE), rng.uniform(0.0, math.pi)
        across = rng.normal(0.0, 0.06) * length * (1 - 4 * along**2)
        centre = rng.uniform(0.2, 0.8, 2) * (width, height)
        points = centre[:, None] + length * np.outer((math.cos(angle), math.sin(angle)), along)
        points = OVERSAMPLING * (points + np.outer((-math.sin(angle), math.cos(angle)), across))
        draw.line([(float(a), float(b)) for a, b in points.T], fill=255, width=thickness)
    where = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32) / 255.0
    opacity = rng.uniform(0.3, 1.0) * where[..., None]
    colour = rng.uniform(0.0, 255.0, 3) if rng.random() < 0.5 else float(rng.choice([0.0, 255.0]))
    return (x * (1 - opacity) + opacity * colour).astype(np.float32), where


def _blur(x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A part out of focus, or all of it."""
    from scipy.ndimage import gaussian_filter

    where, _ = _place(x, rng)
    if rng.random() < 0.2:
        where = np.ones_like(where)
    sigma = rng.uniform(1.0, 4.0)
    return x + (gaussian_filter(x, (sigma, sigma, 0.0)) - x) * where[..., None], where


def _noise(x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian noise, the same in all channels or in each its own."""
    where, _ = _place(x, rng)
    size = x.shape if rng.random() < 0.6 else (*x.shape[:2], 1)
    noise = rng.standard_normal(size, np.float32) * np.float32(rng.uniform(8.0, 50.0))
    return x + where[..., None] * noise, where


def _patch(x: np.ndarray, source: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A part of a picture, blended in; mostly with the colours of what it covers, often with its contrast too."""
    where, box = _place(x, rng)
    rows, columns = (rng.integers(0, source.shape[axis]) + np.arange(x.shape[axis]) for axis in (0, 1))
    if rng.random() < 0.5:
        columns = columns[::-1]
    moved = source[np.ix_(_reflect(rows, source.shape[0]), _reflect(columns, source.shape[1]))]
    if rng.random() < 0.85:
        ours, theirs = (values[box].reshape(-1, 3) for values in (x, moved))
        contrast = (ours.std(axis=0) / (theirs.std(axis=0) + 1e-3)).clip(0.5, 2.0) if rng.random() < 0.7 else 1.0
        moved = (moved - theirs.mean(axis=0)) * contrast + ours.mean(axis=0)
    return x + (moved - x) * where[..., None], where


def _place(x: np.ndarray, rng: Generator) -> tuple[np.ndarray, tuple[slice, slice]]:
    """A rectangle or a blob with a soft edge as a mask, and the box around it."""
    from scipy.ndimage import gaussian_filter

    height, width = x.shape[:2]
    size, shape = math.exp(rng.uniform(math.log(LEAST_SIDE), math.log(LARGEST_SIDE))), math.exp(rng.uniform(-0.3, 0.3))
    tall, wide = min(height, round(size * shape)), min(width, round(size / shape))
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    box = (slice(top, top + tall), slice(left, left + wide))
    where = np.zeros((height, width), np.float32)
    if rng.random() < 0.6:
        where[box] = 1.0
    else:
        field = gaussian_filter(rng.standard_normal((tall, wide), np.float32), math.sqrt(tall * wide) / 6)
        where[box] = field > np.quantile(field, 0.4)
    return gaussian_filter(where, rng.uniform(0.5, 4.0)), box


def _reflect(places: np.ndarray, size: int) -> np.ndarray:
    """Places beyond the end, mirrored back into 0 to size - 1."""
    folded = places % (2 * size)
    return np.where(folded < size, folded, 2 * size - 1 - folded)
