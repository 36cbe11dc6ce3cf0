"""Equivariance of the latent space: turning and scaling a latent should turn and scale its picture, and nothing else.

Shapes: B batch, C channels, H W pixels, h w latent cells.

Source: Kouzelis et al., "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling", arXiv
2502.09509, eq. 5 and 6; zelaki/eqvae@386becd:ldm/models/autoencoder.py (probabilities, bilinear resampling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_vae.losses.config import EquivarianceConfig

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["IDENTITY", "Similarity", "draw_similarity", "equivariance_errors"]

_STREAM = (3,)
"""Spawn key beside those of `sd_vae.data.randomness`, which have three numbers."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Turn by quarter turns after scaling; the same for pictures and latents, so that their grids stay aligned."""

    scale: float = 1.0
    """Factor of height and width, rounded to whole latent cells."""
    quarter_turns: int = 0
    """Turns by 90 degrees."""
    of_latent: bool = True
    """Whether the latent is transformed, not the picture before it is encoded."""

    def __call__(self, x: Tensor, factor: int = 1) -> Tensor:
        """Return x turned and scaled.

        Args:
            x: Latents (B, C, h, w), or pictures (B, C, H, W).
            factor: Pixels a latent cell; 1 for latents.
        """
        if self.scale != 1.0:
            size = [factor * max(1, round(self.scale * (side // factor))) for side in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return torch.rot90(x, self.quarter_turns, dims=(-2, -1)) if self.quarter_turns else x


IDENTITY = Similarity()
"""Leaves everything as it is, and costs nothing."""


def draw_similarity(config: EquivarianceConfig, seed: int, step: int, num_cells: int) -> Similarity:
    """Return the transformation of one optimizer step, a pure function of its arguments.

    With `probability`, latents are turned by 1, 2 or 3 quarters and scaled; otherwise, with `small_probability`, the
    pictures are scaled before they are encoded; otherwise nothing happens. A scale is k / num_cells, uniform over the k
    from `min_scale` to below 1.

    Args:
        config: Probabilities and smallest scale.
        seed: Seed of the run.
        step: Optimizer steps taken; all batches and processes of a step share the transformation.
        num_cells: Latent cells of a side.
    """
    if config.probability == 0:
        return IDENTITY
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*_STREAM, step)))
    is_turned, is_small = rng.random() < config.probability, rng.random() < config.small_probability
    smallest = max(1, round(config.min_scale * num_cells))
    scale = int(rng.integers(smallest, max(num_cells, smallest + 1))) / num_cells
    quarter_turns = int(rng.integers(1, 4))
    if is_turned:
        return Similarity(scale=scale, quarter_turns=quarter_turns)
    return Similarity(scale=scale, of_latent=False) if is_small else IDENTITY


@torch.no_grad()
def equivariance_errors(vae: AutoencoderKL, photos: Tensor, device: torch.device) -> dict[str, float]:
    """Return how far a VAE is from equivariance, over three turns and the scales 1/4, 1/2 and 3/4; 0 is best.

    Each is a root mean square over all transformations t and photos x, relative to the standard deviation of what it is
    compared with: `latent` of t(E(x)) - E(t(x)), `picture` of D(t(E(x))) - t(x), E the posterior's mean.

    Args:
        vae: Model.
        photos: (N, 3, H, W) in [-1, 1], square, run one at a time.
        device: Where the model is.
    """
    turns = [Similarity(quarter_turns=quarters) for quarters in (1, 2, 3)]
    scales = [Similarity(scale=scale) for scale in (0.25, 0.5, 0.75)]
    errors: dict[str, float] = {}
    for kind, similarities in (("turn", turns), ("scale", scales)):
        latent, picture = _Relative(), _Relative()
        for x in photos.split(1):
            x = x.to(device)
            z = vae.encode(x).latent_dist.mode()
            for similarity in similarities:
                target = similarity(x, vae.factor)
                latent.add(similarity(z), vae.encode(target).latent_dist.mode())
                picture.add(vae.decode(similarity(z)).sample, target)
        errors |= {f"latent_{kind}": latent.value, f"picture_{kind}": picture.value}
    return errors


class _Relative:
    """Root of the sum of squared errors over the sum of squared deviations of the targets from their own means."""

    def __init__(self) -> None:
        self.errors = self.deviations = 0.0

    def add(self, value: Tensor, target: Tensor) -> None:
        self.errors += float((value - target).double().square().sum())
        self.deviations += float((target - target.mean(dim=(2, 3), keepdim=True)).double().square().sum())

    @property
    def value(self) -> float:
        return float((self.errors / max(self.deviations, 1e-12)) ** 0.5)
