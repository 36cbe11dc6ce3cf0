"""How finely each latent channel is kept: as coarse as the decoder's own error hides.

A change of z by noise of variance s_c^2 in channel c changes the decoder's picture, to first order, by a squared error
of sum over c of g_c^2 s_c^2 a cell, where g_c^2 is the squared length of a column of the decoder's Jacobian. Rounding
to multiples of D_c is noise of variance D_c^2 / 12, and at a given total error the bits are fewest where every channel
has the same share: D_c = t / g_c. How large t may be is measured against what the VAE itself loses: where its own error
is D, quantisation that adds D / 20 costs 0.2 dB.

Source: Gersho and Gray, "Vector Quantization and Signal Compression", 1992, chapter 8, for bit allocation at high rate;
Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990, for the Jacobian's column lengths.

Shapes: B probes, C latent channels, H W pixels, h w latent cells, f the VAE's factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sd_vae.images import pad_to_factor

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["DEFAULT_QUALITY", "Sensitivity", "level_of_quality", "probe", "sensitivity"]

DEFAULT_QUALITY = 75.0
"""Costs about 0.2 dB."""

LEVEL_AT_DEFAULT_DB = -13.3
"""Squared error of quantisation over that of the VAE, in dB: 10 log10(1 + 10^-1.33) is 0.2 dB."""

DB_PER_QUALITY = 0.4
"""How much that falls from one quality to the next."""

PROBE_SIZE = 128
"""Side of each of the four squares that are looked at in a large picture, in pixels."""

LEAST_ERROR = 1e-4
"""Mean squared error, on [-1, 1], below which a VAE is not taken to be better: 46 dB."""


@dataclass(frozen=True)
class Sensitivity:
    """What a VAE does around one picture."""

    gains: tuple[float, ...]
    """g_c: length of the change of the picture (sum of squares over 3, H, W) by a change of one in z."""
    error: float
    """Its mean squared error on [-1, 1], without any quantisation."""
    factor: int
    """f."""

    def steps(self, level_db: float) -> tuple[float, ...]:
        """Return the distance between neighbouring values of z for each channel.

        mean over 3, H, W of the squared error by quantisation = sum over c of g_c^2 D_c^2 / 12 / (3 f^2), which is set
        to `error` * 10^(level_db / 10), every channel adding the same.

        Args:
            level_db: Squared error of quantisation over that of the VAE.
        """
        wanted = max(self.error, LEAST_ERROR) * 10.0 ** (level_db / 10.0)
        share = 6.0 * self.factor * (wanted / len(self.gains)) ** 0.5
        return tuple(share / gain for gain in self.gains)


def level_of_quality(quality: float) -> float:
    """Return the squared error of quantisation over that of the VAE, in dB, at a quality of 1 to 100."""
    return LEVEL_AT_DEFAULT_DB - DB_PER_QUALITY * (quality - DEFAULT_QUALITY)


def probe(x: Tensor, factor: int) -> Tensor:
    """Return what is looked at of a picture: all of a small one, of others the middles of its four quarters.

    Args:
        x: (1, 3, H, W) in [-1, 1].
        factor: The VAE's.

    Returns:
        (1 or 4, 3, H', W'), sides multiples of the factor.
    """
    height, width = x.shape[-2:]
    side = -(-PROBE_SIZE // factor) * factor
    if min(height, width) < 2 * side:
        return pad_to_factor(x[..., : 2 * side, : 2 * side], factor)
    tops, lefts = ([(size // 2 - side) // 2, size // 2 + (size // 2 - side) // 2] for size in (height, width))
    return torch.cat([x[..., top : top + side, left : left + side] for top in tops for left in lefts])


def sensitivity(vae: AutoencoderKL, x: Tensor) -> Sensitivity:
    """Return how much each latent channel counts for the picture, and what the VAE loses of it; draws from seed 0.

    One decode and one backward pass: for noise r with one N(0, 1) a pixel, E[(J^T r)_i^2] is the squared length of the
    Jacobian's column i; the mean over the cells of a channel is its g_c^2.

    Args:
        vae: The VAE.
        x: Probes (B, 3, H, W) in [-1, 1], sides divisible by the factor.
    """
    with torch.inference_mode(False):  # where the caller is in it, there would be no backward pass
        x = x.to(vae.device, vae.dtype, copy=True)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            recon = vae.decode(z).sample
            (gradient,) = torch.autograd.grad(recon, z, noise)
    squares = gradient.float().square().mean(dim=(0, 2, 3)).double().cpu()
    # A channel that the decoder ignores gets a coarse step, not an infinite one.
    gains = squares.sqrt().clamp(min=max(1e-6 * float(squares.max().sqrt()), 1e-12))
    error = float((recon.detach().float().clamp(-1.0, 1.0) - x.float()).square().mean())
    return Sensitivity(tuple(gains.tolist()), error, vae.factor)
