"""The training objective: every term by name, and their weighted sum.

Shapes: B batch, H W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sd_vae.losses.config import LossConfig
from sd_vae.losses.kl import kl_loss
from sd_vae.losses.perceptual import build_perceptual
from sd_vae.losses.reconstruction import reconstruction_loss
from sd_vae.posterior import DiagonalGaussian

__all__ = ["Objective", "ObjectiveResult"]


class ObjectiveResult(NamedTuple):
    """What one batch is judged to be."""

    total: Tensor
    """The weighted sum, a scalar with gradient."""
    terms: dict[str, Tensor]
    """Each term unweighted, a scalar without gradient: reconstruction, the perceptual term's own name, kl."""


class Objective(nn.Module):
    """total = reconstruction + perceptual.weight * mean perceptual distance + kl.weight * kl.

    Every term is a mean over the batch, so repeating the batch changes nothing. A term of weight 0 adds nothing, not
    even a zero: the run is bit for bit one without it.

    Args:
        config: Terms, weights, conventions.

    Raises:
        UserError: The perceptual network's weights are missing or not what they should be.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = build_perceptual(config.perceptual)

    def forward(self, x: Tensor, recon: Tensor, posterior: DiagonalGaussian) -> ObjectiveResult:
        """Return the total and every term.

        Args:
            x: Images (B, 3, H, W) in [-1, 1].
            recon: Their reconstructions (B, 3, H, W), unclamped.
            posterior: The posterior that they were decoded from.

        Raises:
            UserError: Shapes differ, or the images are too small for the perceptual term.
        """
        config = self.config
        total = reconstruction_loss(recon, x, config.reconstruction)
        terms = {"reconstruction": total.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(recon, x).mean()
            terms[self.perceptual.name] = distance.detach()
            total = total + config.perceptual.weight * distance
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.kl.weight > 0):
            kl = kl_loss(posterior, config.kl.convention, num_image_elements=x[0].numel())
        terms["kl"] = kl.detach()
        if config.kl.weight > 0:
            total = total + config.kl.weight * kl
        return ObjectiveResult(total, terms)
