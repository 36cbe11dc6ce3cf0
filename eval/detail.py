"""Colour and detail: what a distance of pixels does not tell apart, a cast from noise and softness from error.

Shapes: H W pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .metrics import float_pixels

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["HIGH_FREQUENCY", "ciede2000", "colour_shift", "gradient_retention", "hf_energy_ratio"]

HIGH_FREQUENCY = 0.25
"""Cycles per pixel from which detail counts as high-frequency: half of what the pixels can hold."""

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of RGB in brightness, ITU-R BT.601."""


def ciede2000(recon: Image.Image, x: Image.Image) -> float:
    """Return the CIEDE2000 colour difference of 8-bit sRGB pictures, mean over pixels; about 1 is just noticeable.

    Raises:
        UserError: The sizes differ.

    Source: Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", Color Research 30(1), 2005.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab

    a, b = (rgb2lab(pixels / 255.0) for pixels in float_pixels(recon, x))
    return float(np.mean(deltaE_ciede2000(b, a)))


def colour_shift(recon: Image.Image, x: Image.Image) -> float:
    """Return the CIEDE2000 difference between the mean CIELAB colours of 8-bit sRGB pictures.

    Raises:
        UserError: The sizes differ.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab

    a, b = (rgb2lab(pixels / 255.0).mean(axis=(0, 1)) for pixels in float_pixels(recon, x))
    return float(deltaE_ciede2000(b, a))


def gradient_retention(recon: Image.Image, x: Image.Image) -> float:
    """Return how much of the photo's brightness gradient g is in the reconstruction's gradient r: sum(r g) / sum(g g).

    1 for equal pictures, below 1 where edges are softer; noise that the photo does not have averages out. A photo
    without gradient gives 1.

    Raises:
        UserError: The sizes differ.
    """
    from scipy.ndimage import sobel

    r, g = (
        np.stack([sobel(pixels @ LUMA, axis=axis, mode="nearest") for axis in (0, 1)])
        for pixels in float_pixels(recon, x)
    )
    energy = float(np.sum(g * g))
    return float(np.sum(r * g)) / energy if energy else 1.0


def hf_energy_ratio(recon: Image.Image, x: Image.Image) -> float:
    """Return the energy of brightness at 0.25 cycles per pixel and more, reconstruction over photo, Hann window.

    1 for equal pictures, below 1 where detail is lost, above 1 where noise is added. A photo without such energy gives
    1 where the reconstruction has none either, otherwise infinity.

    Raises:
        UserError: The sizes differ.
    """
    ours, theirs = (_high_energy(pixels @ LUMA) for pixels in float_pixels(recon, x))
    if theirs < 1e-9:  # what rounding leaves of a flat picture
        return 1.0 if ours < 1e-9 else math.inf
    return ours / theirs


def _high_energy(brightness: np.ndarray) -> float:
    """Mean squared magnitude of the high frequencies."""
    from scipy import fft

    height, width = brightness.shape
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    mean = np.sum(brightness * window) / np.sum(window)
    spectrum = fft.fft2((brightness - mean) * window)
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.fftfreq(width)[None, :])
    return float(np.sum(np.square(np.abs(spectrum[frequency >= HIGH_FREQUENCY])))) / (height * width) ** 2
