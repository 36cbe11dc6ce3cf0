"""Latents described by sums: scale, KL and activity, per channel and altogether.

The sums of photos add up to the statistics of a set, the same to the last bit in whatever order they come.

Shapes: C latent channels, h w latent cells.

Sources: Rombach et al., arXiv 2112.10752, appendix G (scaling factor); Burda, Grosse and Salakhutdinov, "Importance
Weighted Autoencoders", arXiv 1509.00519, section 5.2 (active units).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae._diffusers import DiagonalGaussianDistribution

__all__ = ["ACTIVE_VARIANCE", "LatentStats", "LatentSums"]

ACTIVE_VARIANCE = 0.01
"""A channel is active where the variance of its posterior mean, over all cells of all photos, exceeds this."""


@dataclass(frozen=True, kw_only=True)
class LatentSums:
    """What one photo adds to the statistics of latents."""

    num_cells: int
    """Latent cells, h * w."""
    z: tuple[float, ...]
    """Sum of E[z] over cells, one value a channel."""
    z_squared: tuple[float, ...]
    """Sum of E[z^2] = mean^2 + var over cells, one value a channel."""
    mean_squared: tuple[float, ...]
    """Sum of E[z]^2 over cells, one value a channel."""
    kl: tuple[float, ...] | None
    """KL to N(0, I) in nats, summed over cells, one value a channel; None for latents without a posterior."""

    @classmethod
    def of(cls, posterior: DiagonalGaussianDistribution) -> LatentSums:
        """Return the sums of a posterior over one photo, (1, C, h, w), taken in float64 on the CPU."""
        from sd_vae.posterior import DiagonalGaussian

        exact = DiagonalGaussian(posterior.parameters.detach().to("cpu").double())
        return cls(
            num_cells=exact.mean.shape[-2] * exact.mean.shape[-1],
            z=_per_channel(exact.mean),
            z_squared=_per_channel(exact.mean.square() + exact.var),
            mean_squared=_per_channel(exact.mean.square()),
            kl=_per_channel(exact.kl_map()),
        )

    @classmethod
    def of_point(cls, z: Tensor) -> LatentSums:
        """Return the sums of latents (1, C, h, w) that are no draw from a posterior, as a plain autoencoder's."""
        exact = z.detach().to("cpu").double()
        squares = _per_channel(exact.square())
        return cls(
            num_cells=exact.shape[-2] * exact.shape[-1],
            z=_per_channel(exact),
            z_squared=squares,
            mean_squared=squares,
            kl=None,
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
    """KL to N(0, I) in nats, mean over all elements; NaN for latents without a posterior."""
    scaling_factor: float
    """1 / std, which gives the scaled latents unit variance; how latent diffusion models choose theirs."""
    channel_kl: tuple[float, ...] = ()
    """KL per element of each channel in nats; empty for latents without a posterior."""
    active_units: int | None = None
    """Channels whose posterior mean varies by more than `ACTIVE_VARIANCE`; the others say nothing about the photo."""

    @classmethod
    def pooled(cls, sums: Sequence[LatentSums]) -> LatentStats:
        """Return the statistics over photos, the same to the last bit in whatever order they come."""
        num_cells = sum(part.num_cells for part in sums)
        first = _means([part.z for part in sums], num_cells)
        second = _means([part.z_squared for part in sums], num_cells)
        of_means = _means([part.mean_squared for part in sums], num_cells)
        kl = _means([part.kl for part in sums if part.kl is not None], num_cells)
        mean, mean_square = math.fsum(first) / len(first), math.fsum(second) / len(second)
        std = math.sqrt(max(mean_square - mean**2, 0.0))
        return cls(
            mean=mean,
            std=std,
            channel_mean=first,
            channel_std=tuple(math.sqrt(max(b - a**2, 0.0)) for a, b in zip(first, second, strict=True)),
            kl_per_element=math.fsum(kl) / len(kl) if kl else math.nan,
            scaling_factor=1.0 / std if std else math.inf,
            channel_kl=kl,
            active_units=sum(b - a**2 > ACTIVE_VARIANCE for a, b in zip(first, of_means, strict=True)),
        )

    def values(self) -> dict[str, float]:
        """Return the numbers that have an entry in `METRICS`."""
        known = {
            "kl_per_element": self.kl_per_element,
            "latent_mean": self.mean,
            "latent_std": self.std,
            "scaling_factor": self.scaling_factor,
        }
        return known if self.active_units is None else {**known, "active_units": float(self.active_units)}


def _per_channel(values: Tensor) -> tuple[float, ...]:
    """Sums of (1, C, h, w) over everything but C."""
    return tuple(values.sum(dim=(0, 2, 3)).tolist())


def _means(sums: Sequence[tuple[float, ...]], num_cells: int) -> tuple[float, ...]:
    """Means per cell of per-photo sums, one value a channel; empty without photos."""
    return tuple(math.fsum(channel) / num_cells for channel in zip(*sums, strict=True))
