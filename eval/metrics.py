"""What is measured, and in which convention: one table of metrics, and the functions that compare two pictures.

Pictures are compared as a viewer sees them, as 8-bit RGB after clamping and rounding. Every number is float64, belongs
to one photo, and is averaged over photos afterwards: the PSNR of a set is the mean of its photos' PSNRs (as papers on
autoencoders report it); the PSNR of the pooled squared error stands beside it under its own name. Formulae are those of
scikit-image, SciPy and torchmetrics.

Shapes: H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from skimage.metrics import structural_similarity

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "METRICS",
    "MIN_SIZE",
    "Metric",
    "SsimWindow",
    "float_pixels",
    "l1",
    "mean_squared_error",
    "ms_ssim",
    "perceptual_metric",
    "pooled_psnr_db",
    "psnr_db",
    "ssim",
]

SsimWindow = Literal["gaussian-11", "uniform-7"]
"""gaussian-11: 11 pixels, sigma 1.5, population covariance, as in the paper. uniform-7: scikit-image's default."""

SSIM_OPTIONS: dict[SsimWindow, dict[str, Any]] = {
    "gaussian-11": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
    "uniform-7": {"win_size": 7, "use_sample_covariance": True},
}

MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales, finest first."""

C1, C2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
"""What keeps SSIM's fractions finite."""

MIN_SIZE = {"ssim": 11, "ms_ssim": 176, "lpips_vgg": 16, "lpips_alex": 31, "lpips_squeeze": 17}
"""Pixels that both sides need for a metric: its window on its coarsest scale, its network's last feature map."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a number is named, read and printed."""

    label: str
    """Name in tables."""
    unit: str = ""
    """Unit, empty for a pure number."""
    range: str = ""
    """Values that it can have, and where it is perfect."""
    higher_is_better: bool | None = None
    """None where neither direction is better."""
    digits: int
    """Decimals in tables."""
    about: str
    """What it is, in a sentence."""

    @property
    def heading(self) -> str:
        """Column heading, such as `PSNR (dB) ↑`."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return self.label + (f" ({self.unit})" if self.unit else "") + arrow

    def format(self, value: float) -> str:
        """Return a value as tables show it."""
        if math.isnan(value):
            return "–"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        text = f"{value:.{self.digits}f}"
        return text.removeprefix("-") if float(text) == 0.0 else text.replace("-", "−")


def perceptual_metric(name: str) -> Metric:
    """Return the table entry of a perceptual distance that is in no table, called by its own name."""
    return Metric(
        label=name,
        higher_is_better=False,
        digits=4,
        about="Perceptual distance, of the 8-bit pictures; 0 for equal ones.",
    )


def _lpips(net: str) -> Metric:
    return Metric(
        label=f"LPIPS {net}",
        range="0 and up, 0 for equal pictures",
        higher_is_better=False,
        digits=4,
        about=f"Distance of {net} features with the heads of the lpips package, version 0.1, of the 8-bit pictures.",
    )


def _frechet(label: str, features: str) -> Metric:
    return Metric(
        label=label,
        range="0 and up, 0 for equal statistics; biased upwards by few photos",
        higher_is_better=False,
        digits=3,
        about=f"Fréchet distance of all reconstructions to all photos in {features}; one number for the whole set.",
    )


METRICS: dict[str, Metric] = {
    "psnr_db": Metric(
        label="PSNR",
        unit="dB",
        range="0 and up, ∞ for equal pictures",
        higher_is_better=True,
        digits=2,
        about="Peak signal-to-noise ratio of 8-bit RGB, 10 log10(255² / mean squared error); mean of the photos' own.",
    ),
    "ssim": Metric(
        label="SSIM",
        range="−1 to 1, 1 for equal pictures",
        higher_is_better=True,
        digits=4,
        about="Structural similarity of 8-bit RGB, mean over positions and channels; the protocol says which window.",
    ),
    "ms_ssim": Metric(
        label="MS-SSIM",
        range="0 to 1, 1 for equal pictures",
        higher_is_better=True,
        digits=4,
        about="Structural similarity over five scales, Gaussian window of 11 pixels (sigma 1.5), of 8-bit RGB.",
    ),
    "lpips_vgg": _lpips("vgg"),
    "lpips_alex": _lpips("alex"),
    "lpips_squeeze": _lpips("squeeze"),
    "l1": Metric(
        label="L1",
        unit="levels",
        range="0 to 255, 0 for equal pictures",
        higher_is_better=False,
        digits=3,
        about="Mean absolute difference of 8-bit RGB.",
    ),
    "ciede2000": Metric(
        label="CIEDE2000",
        range="0 to about 120, 0 for equal pictures; 1 is just noticeable",
        higher_is_better=False,
        digits=3,
        about="Colour difference of each pixel in CIELAB (sRGB, D65), mean over pixels.",
    ),
    "colour_shift": Metric(
        label="Colour shift",
        range="0 to about 120, 0 for equal mean colours; 1 is just noticeable",
        higher_is_better=False,
        digits=3,
        about="CIEDE2000 between the mean colours of reconstruction and photo: a cast over the whole picture.",
    ),
    "gradient_retention": Metric(
        label="Gradient retention",
        range="any, 1 for equal pictures, below 1 where edges are softer",
        digits=4,
        about="How much of the photo's brightness gradient (Sobel) the reconstruction has; noise does not count.",
    ),
    "hf_energy_ratio": Metric(
        label="High-frequency energy",
        range="0 and up, 1 for equal pictures; below 1 detail is lost, above 1 noise is added",
        digits=4,
        about="Energy of brightness above a quarter cycle per pixel, reconstruction over photo.",
    ),
    "pooled_psnr_db": Metric(
        label="Pooled PSNR",
        unit="dB",
        range="0 and up, ∞ for equal pictures",
        higher_is_better=True,
        digits=2,
        about="10 log10(255² / mean squared error over all photos, each counted once); never above the mean PSNR.",
    ),
    "rfid": _frechet("rFID", "the 2048 pooled features of torch-fidelity's Inception"),
    "frechet_vgg": _frechet("Fréchet vgg", "the mean last features of VGG16"),
    "frechet_alex": _frechet("Fréchet alex", "the mean last features of AlexNet"),
    "frechet_squeeze": _frechet("Fréchet squeeze", "the mean last features of SqueezeNet 1.1"),
    "kl_per_element": Metric(
        label="KL per element",
        unit="nats",
        range="0 and up",
        digits=3,
        about="KL divergence of the posterior from N(0, I), mean over latent elements.",
    ),
    "active_units": Metric(
        label="Active channels",
        range="0 to the number of channels",
        digits=0,
        about="Latent channels whose posterior mean varies over cells and photos by a variance of more than 0.01.",
    ),
    "latent_mean": Metric(label="Latent mean", range="any", digits=4, about="Mean of the raw latents z."),
    "latent_std": Metric(
        label="Latent std", range="0 and up", digits=4, about="Standard deviation of the raw latents z."
    ),
    "scaling_factor": Metric(
        label="Estimated scaling factor",
        range="0 and up",
        digits=5,
        about="1 / standard deviation of the raw latents: the factor that gives latents unit variance.",
    ),
}
"""Every metric but a perceptual term of the caller's own: see `perceptual_metric`."""


def mean_squared_error(recon: Image.Image, x: Image.Image) -> float:
    """Return the mean squared difference of 8-bit RGB pictures, over H, W, RGB, in squared levels.

    Raises:
        UserError: The sizes differ.
    """
    a, b = float_pixels(recon, x)
    return float(np.mean(np.square(a - b)))


def psnr_db(recon: Image.Image, x: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of 8-bit RGB pictures in dB: 10 log10(255^2 / MSE), mean over H, W, RGB.

    Infinite for equal pictures.

    Raises:
        UserError: The sizes differ.
    """
    return _decibel(mean_squared_error(recon, x))


def pooled_psnr_db(psnrs_db: Iterable[float]) -> float:
    """Return the PSNR in dB of a set's mean squared error, from the photos' own PSNRs."""
    errors = [0.0 if math.isinf(psnr) else 255.0**2 / 10.0 ** (psnr / 10.0) for psnr in psnrs_db]
    return _decibel(math.fsum(errors) / len(errors))


def ssim(recon: Image.Image, x: Image.Image, window: SsimWindow = "gaussian-11") -> float:
    """Return the structural similarity of 8-bit RGB pictures, 1 for equal ones, mean over positions and RGB.

    As scikit-image spells it, with data range 255, K1 = 0.01, K2 = 0.03, positions whose window leaves the picture left
    out.

    Args:
        recon: Reconstruction.
        x: Photo.
        window: gaussian-11 is the convention of the paper: sigma 1.5 and population covariance. uniform-7 is what
            scikit-image does by default: 7 pixels of equal weight and sample covariance.

    Raises:
        UserError: The sizes differ, or a side is below 11 pixels.

    Source: Wang et al., "Image quality assessment", IEEE TIP 13(4), 2004.
    """
    a, b = float_pixels(recon, x)
    _require_size("ssim", x)
    return float(structural_similarity(a, b, channel_axis=2, data_range=255.0, **SSIM_OPTIONS[window]))


def ms_ssim(recon: Image.Image, x: Image.Image) -> float:
    """Return the multi-scale structural similarity of 8-bit RGB pictures, 1 for equal ones.

    Five scales with the paper's exponents, Gaussian window of 11 pixels with sigma 1.5, data range 255, negative
    similarities cut off at 0: torchmetrics' numbers, mirrored border of the coarsest scale included. Its dense windows
    take 40 times as long in float64.

    Raises:
        UserError: The sizes differ, or a side is below 176 pixels.

    Source: Wang, Simoncelli and Bovik, "Multi-scale structural similarity", Asilomar 2003.
    """
    from scipy.ndimage import gaussian_filter

    a, b = float_pixels(recon, x)
    _require_size("ms_ssim", x)

    product = 1.0
    for scale, exponent in enumerate(MS_SSIM_EXPONENTS, start=1):
        mean_a, mean_b, square_a, square_b, cross = (
            gaussian_filter(values, 1.5, truncate=3.5, mode="mirror", axes=(0, 1))
            for values in (a, b, a * a, b * b, a * b)
        )
        spread = square_a - mean_a**2 + square_b - mean_b**2
        structure = (2 * (cross - mean_a * mean_b) + C2) / (spread + C2)
        if scale < len(MS_SSIM_EXPONENTS):
            structure = structure[5:-5, 5:-5]  # where the window lies inside
            a, b = _halved(a), _halved(b)
        else:
            structure = structure * (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
        product *= max(float(structure.mean()), 0.0) ** exponent
    return product


def _halved(values: np.ndarray) -> np.ndarray:
    """Means of 2x2 blocks; an odd last line is dropped."""
    height, width = (side // 2 * 2 for side in values.shape[:2])
    return values[:height, :width].reshape(height // 2, 2, width // 2, 2, -1).mean(axis=(1, 3))


def l1(recon: Image.Image, x: Image.Image) -> float:
    """Return the mean absolute difference of 8-bit RGB pictures in levels, 0 to 255.

    Raises:
        UserError: The sizes differ.
    """
    a, b = float_pixels(recon, x)
    return float(np.mean(np.abs(a - b)))


def _decibel(mse: float) -> float:
    return 10.0 * math.log10(255.0**2 / mse) if mse else math.inf


def _require_size(metric: str, x: Image.Image) -> None:
    if min(x.size) < MIN_SIZE[metric]:
        raise UserError(
            f"{METRICS[metric].label} needs pictures of at least {MIN_SIZE[metric]}x{MIN_SIZE[metric]} pixels, "
            f"this one has {x.width}x{x.height}; leave it out or resize it."
        )


def float_pixels(recon: Image.Image, x: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return both pictures as float64 (H, W, 3) in 0..255.

    Raises:
        UserError: The sizes differ.
    """
    if recon.size != x.size:
        raise UserError(
            f"pictures of {recon.width}x{recon.height} and {x.width}x{x.height} cannot be compared; "
            "crop or resize one to the other."
        )
    return np.asarray(recon.convert("RGB"), np.float64), np.asarray(x.convert("RGB"), np.float64)
