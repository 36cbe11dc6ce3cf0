"""Defects in photos, by a seed: what `benchmarks.anomaly` asks a detector to find.

They share no code with what the detector paints into normal pictures to learn from (`sd_vae.latents.anomaly.painting`),
and each is of one kind. Photos are (H, W, 3) in uint8; patches cover at most 1/16 of them.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

__all__ = ["DEFECTS", "make_defect"]

LARGEST_SHARE = 1 / 16
"""Of the photo's area, for every patch."""
FEATHER = 2.0
"""Pixels; sigma of the soft edge of a patch from another photo."""
OVERSAMPLING = 4


def scratches(photo: np.ndarray, donor: np.ndarray, rng: Generator) -> np.ndarray:
    """Return the photo with two to four bright or dark arcs, 1.5 pixels wide."""
    del donor
    height, width = photo.shape[:2]
    canvas = Image.new("L", (OVERSAMPLING * width, OVERSAMPLING * height))
    draw = ImageDraw.Draw(canvas)
    steps = np.linspace(-0.5, 0.5, 7)
    for _ in range(rng.integers(2, 5)):
        length, angle = rng.uniform(0.15, 0.6) * min(height, width), rng.uniform(0.0, np.pi)
        bend = 0.06 * rng.normal() * length * (1 - 4 * steps**2)
        x = rng.uniform(0.2, 0.8) * width + np.cos(angle) * steps * length - np.sin(angle) * bend
        y = rng.uniform(0.2, 0.8) * height + np.sin(angle) * steps * length + np.cos(angle) * bend
        points = [(float(a), float(b)) for a, b in OVERSAMPLING * np.stack([x, y], axis=1)]
        draw.line(points, fill=255, width=round(1.5 * OVERSAMPLING))
    strength = rng.uniform(0.6, 0.9) * np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255.0
    return _mixed(photo, np.full(photo.shape, rng.choice([0.0, 255.0])), strength)


def blur(photo: np.ndarray, donor: np.ndarray, rng: Generator) -> np.ndarray:
    """Return the photo out of focus as a whole, sigma 1.5 to 3 pixels."""
    del donor
    sigma = rng.uniform(1.5, 3.0)
    return _mixed(photo, gaussian_filter(photo.astype(np.float64), (sigma, sigma, 0.0)), np.ones(photo.shape[:2]))


def blurred_patch(photo: np.ndarray, donor: np.ndarray, rng: Generator) -> np.ndarray:
    """Return the photo with a part out of focus, sigma 2 to 3 pixels."""
    del donor
    sigma = rng.uniform(2.0, 3.0)
    blurred = gaussian_filter(photo.astype(np.float64), (sigma, sigma, 0.0))
    return _mixed(photo, blurred, gaussian_filter(_rectangle(photo, LARGEST_SHARE, rng)[0], 1.0))


def noise_patch(photo: np.ndarray, donor: np.ndarray, rng: Generator) -> np.ndarray:
    """Return the photo with Gaussian noise in a part of it, sigma 20 to 40 levels."""
    del donor
    noisy = photo + rng.normal(0.0, rng.uniform(20.0, 40.0), photo.shape)
    return _mixed(photo, noisy, gaussian_filter(_rectangle(photo, LARGEST_SHARE, rng)[0], 1.0))


def foreign_patch(photo: np.ndarray, donor: np.ndarray, rng: Generator) -> np.ndarray:
    """Return the photo with a part of another one of the same size, its colours matched and its edges blended.

    Mean and deviation of each channel become those of what is covered, the deviation by at most a factor of two.
    """
    mask, box = _rectangle(photo, rng.uniform(LARGEST_SHARE / 2, LARGEST_SHARE), rng)
    shift = [int(rng.integers(0, side)) for side in photo.shape[:2]]
    moved = np.roll(donor.astype(np.float64), shift, axis=(0, 1))
    covered, covering = (values[box].reshape(-1, 3).astype(np.float64) for values in (photo, moved))
    contrast = (covered.std(axis=0) / (covering.std(axis=0) + 1e-3)).clip(0.5, 2.0)
    matched = (moved - covering.mean(axis=0)) * contrast + covered.mean(axis=0)
    return _mixed(photo, matched, gaussian_filter(mask, FEATHER))


DEFECTS: dict[str, Callable[[np.ndarray, np.ndarray, Generator], np.ndarray]] = {
    "scratches": scratches,
    "blur": blur,
    "blurred_patch": blurred_patch,
    "noise_patch": noise_patch,
    "foreign_patch": foreign_patch,
}
"""Kind to what makes it of (photo, another photo, random numbers)."""


def make_defect(kind: str, photo: np.ndarray, donor: np.ndarray, seed: int) -> np.ndarray:
    """Return a photo with a defect of one kind; the same seed gives the same one.

    Args:
        kind: Key of `DEFECTS`.
        photo: (H, W, 3), uint8.
        donor: Another photo of the same size.
        seed: Decides place and strength.
    """
    return DEFECTS[kind](photo, donor, np.random.default_rng((seed, list(DEFECTS).index(kind))))


def _rectangle(photo: np.ndarray, share: float, rng: Generator) -> tuple[np.ndarray, tuple[slice, slice]]:
    """A rectangle of a share of the area, as a mask and as slices."""
    height, width = photo.shape[:2]
    shape = float(np.exp(rng.uniform(-0.5, 0.5)))
    tall = int(np.clip(np.sqrt(share * shape) * height, 8, height))
    wide = int(np.clip(share * height * width / tall, 8, width))
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    box = (slice(top, top + tall), slice(left, left + wide))
    mask = np.zeros((height, width))
    mask[box] = 1.0
    return mask, box


def _mixed(photo: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    mixed = photo + (other - photo) * weight[..., None]
    return np.rint(mixed).clip(0, 255).astype(np.uint8)
