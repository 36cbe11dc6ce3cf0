"""What is measured, and in which convention: one table of metrics, pictures compared by scikit-image, latents by sums.

Pictures are compared as a viewer sees them, as 8-bit RGB after clamping and rounding. Every number is float64, belongs
to one photo, and is averaged over photos afterwards: the PSNR of a set is the mean of its photos' PSNRs (as papers on
autoencoders report it), not the PSNR of the pooled squared error. Latents are described by sums that add up exactly in
any order.

Shapes: H W pixels, C latent channels, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from skimage.metrics import structural_similarity

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from sd_vae._diffusers import DiagonalGaussianDistribution

__all__ = ["METRICS", "LatentStats", "LatentSums", "Metric", "perceptual_metric", "psnr_db", "ssim"]

SSIM_WINDOW = 11
"""Pixels across the Gaussian window, sigma 1.5 cut at 3.5 sigma."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a number is named, read and printed."""

    label: str
    """Name in tables."""
    unit: str = ""
    """Unit, empty for a pure number."""
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
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        return f"{value:.{self.digits}f}".replace("-", "−")


METRICS: dict[str, Metric] = {
    "psnr_db": Metric(
        label="PSNR",
        unit="dB",
        higher_is_better=True,
        digits=2,
        about="Peak signal-to-noise ratio of 8-bit RGB, 10 log10(255² / mean squared error); mean of the photos' own.",
    ),
    "ssim": Metric(
        label="SSIM",
        higher_is_better=True,
        digits=4,
        about="Structural similarity of 8-bit RGB, Gaussian window of 11 pixels (sigma 1.5), mean over channels.",
    ),
    "kl_per_element": Metric(
        label="KL per element",
        unit="nats",
        digits=3,
        about="KL divergence of the posterior from N(0, I), mean over latent elements.",
    ),
    "latent_mean": Metric(label="Latent mean", digits=4, about="Mean of the raw latents z."),
    "latent_std": Metric(label="Latent std", digits=4, about="Standard deviation of the raw latents z."),
    "scaling_factor": Metric(
        label="Estimated scaling factor",
        digits=5,
        about="1 / standard deviation of the raw latents: the factor that gives latents unit variance.",
    ),
}
"""Every metric but the perceptual term, which brings its own name: see `perceptual_metric`."""


def perceptual_metric(name: str) -> Metric:
    """Return the table entry of a perceptual distance, called by its own name."""
    return Metric(
        label=name,
        higher_is_better=False,
        digits=4,
        about="Perceptual distance, of the 8-bit pictures; 0 for equal ones.",
    )


def psnr_db(recon: Image.Image, x: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of 8-bit RGB pictures in dB: 10 log10(255^2 / MSE), mean over H, W, RGB.

    Infinite for equal pictures.

    Raises:
        UserError: The sizes differ.
    """
    a, b = _pixels(recon, x)
    mse = float(np.mean(np.square(a - b)))
    return 10.0 * math.log10(255.0**2 / mse) if mse else math.inf


def ssim(recon: Image.Image, x: Image.Image) -> float:
    """Return the structural similarity of 8-bit RGB pictures, 1 for equal ones, mean over positions and RGB.

    The convention of the paper, as scikit-image spells it: Gaussian window of 11 pixels with sigma 1.5, population
    covariance, data range 255, K1 = 0.01, K2 = 0.03, positions whose window leaves the picture left out.

    Raises:
        UserError: The sizes differ, or a side is below 11 pixels.

    Source: Wang et al., "Image quality assessment", IEEE TIP 13(4), 2004.
    """
    a, b = _pixels(recon, x)
    height, width = a.shape[:2]
    if min(height, width) < SSIM_WINDOW:
        raise UserError(
            f"SSIM needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, this one has {width}x{height}; "
            "leave it out or resize it."
        )
    return float(
        structural_similarity(
            a, b, channel_axis=2, data_range=255.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def _pixels(recon: Image.Image, x: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures as float64 (H, W, 3) in 0..255."""
    if recon.size != x.size:
        raise UserError(
            f"pictures of {recon.width}x{recon.height} and {x.width}x{x.height} cannot be compared; "
            "crop or resize one to the other."
        )
    return np.asarray(recon.convert("RGB"), np.float64), np.asarray(x.convert("RGB"), np.float64)


@dataclass(frozen=True, kw_only=True)
class LatentSums:
    """What one photo's posterior adds to the statistics of latents."""

    num_cells: int
    """Latent cells, h * w."""
    z: tuple[float, ...]
    """Sum of E[z] over cells, one value a channel."""
    z_squared: tuple[float, ...]
    """Sum of E[z^2] = mean^2 + var over cells, one value a channel."""
    kl: float
    """KL to N(0, I) in nats, summed over channels and cells."""

    @classmethod
    def of(cls, posterior: DiagonalGaussianDistribution) -> LatentSums:
        """Return the sums of a posterior over one photo, (1, C, h, w), taken in float64 on the CPU."""
        from sd_vae.posterior import DiagonalGaussian

        exact = DiagonalGaussian(posterior.parameters.detach().to("cpu").double())
        return cls(
            num_cells=exact.mean.shape[-2] * exact.mean.shape[-1],
            z=tuple(exact.mean.sum(dim=(0, 2, 3)).tolist()),
            z_squared=tuple((exact.mean.square() + exact.var).sum(dim=(0, 2, 3)).tolist()),
            kl=float(exact.kl_map().sum()),
        )


@dataclass(frozen=True, kw_only=True)
class LatentStats:
    """Raw latents z ~ q(z|x) over a set of photos, every latent cell counted once.

    Moments of the sampled z without sampling: E[z^2] holds the posterior's own variance, so the result has no noise.
    """

    mean: float
    """Mean of all elements."""
    std: float
    """Standard deviation of all elements around `mean`."""
    channel_mean: tuple[float, ...]
    """Mean of each channel."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel."""
    kl_per_element: float
    """KL to N(0, I) in nats, mean over all elements."""
    scaling_factor: float
    """1 / std, which gives the scaled latents unit variance; how latent diffusion models choose theirs."""

    @classmethod
    def pooled(cls, sums: Sequence[LatentSums]) -> LatentStats:
        """Return the statistics over photos, the same to the last bit in whatever order they come."""
        num_cells = sum(part.num_cells for part in sums)
        first = [math.fsum(channel) / num_cells for channel in zip(*(part.z for part in sums), strict=True)]
        second = [math.fsum(channel) / num_cells for channel in zip(*(part.z_squared for part in sums), strict=True)]
        mean, mean_square = math.fsum(first) / len(first), math.fsum(second) / len(second)
        std = math.sqrt(max(mean_square - mean**2, 0.0))
        return cls(
            mean=mean,
            std=std,
            channel_mean=tuple(first),
            channel_std=tuple(math.sqrt(max(b - a**2, 0.0)) for a, b in zip(first, second, strict=True)),
            kl_per_element=math.fsum(part.kl for part in sums) / (num_cells * len(first)),
            scaling_factor=1.0 / std if std else math.inf,
        )

    def values(self) -> dict[str, float]:
        """Return the numbers that have an entry in `METRICS`."""
        return {
            "kl_per_element": self.kl_per_element,
            "latent_mean": self.mean,
            "latent_std": self.std,
            "scaling_factor": self.scaling_factor,
        }
