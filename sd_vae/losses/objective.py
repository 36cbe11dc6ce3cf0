"""The training objective: every term by name, and their weighted sum.

Shapes: B batch, H W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sd_vae.losses.config import LossConfig
from sd_vae.losses.kl import kl_loss, kl_weight_at
from sd_vae.losses.perceptual import build_perceptual
from sd_vae.losses.reconstruction import OutputLogvar, reconstruction_loss
from sd_vae.posterior import DiagonalGaussian

__all__ = ["Objective", "ObjectiveResult"]


class ObjectiveResult(NamedTuple):
    """What one batch is judged to be."""

    total: Tensor
    """The weighted sum, a scalar with gradient."""
    terms: dict[str, Tensor]
    """Each term unweighted, a scalar without gradient: reconstruction, the perceptual term's own name, kl."""
    fidelity: Tensor
    """Pixel and perceptual term, what `total` is without KL; a scalar with gradient."""


class Objective(nn.Module):
    """total = reconstruction + perceptual.weight * mean perceptual distance + kl.weight * kl.

    With a learned log-variance s, the first two are exp(-s) * (reconstruction + ...) + s. The adversarial term is not
    in it: it needs the discriminator (`sd_vae.losses.adversarial`). Every term is a mean over the batch, so repeating
    the batch changes nothing. A term of weight 0 adds nothing, not even a zero: the run is bit for bit one without it.

    Args:
        config: Terms, weights, conventions.

    Raises:
        UserError: The perceptual network's weights are missing or not what they should be.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = build_perceptual(config.perceptual)
        self.output = OutputLogvar() if config.learn_logvar else None

    def forward(
        self, x: Tensor, recon: Tensor, posterior: DiagonalGaussian, step: int | None = None
    ) -> ObjectiveResult:
        """Return the total, every term, and the total without KL.

        Args:
            x: Images (B, 3, H, W) in [-1, 1].
            recon: Their reconstructions (B, 3, H, W), unclamped.
            posterior: The posterior that they were decoded from.
            step: Optimizer steps taken, for the schedule of the KL weight; None is after it.

        Raises:
            UserError: Shapes differ, or the images are too small for the perceptual term.
        """
        config = self.config
        fidelity = reconstruction_loss(recon, x, config.reconstruction)
        terms = {"reconstruction": fidelity.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(recon, x).mean()
            terms[self.perceptual.name] = distance.detach()
            fidelity = fidelity + config.perceptual.weight * distance
        if self.output is not None:
            fidelity = self.output(fidelity)
            terms["logvar"] = self.output.logvar.detach().clone()
        weight = kl_weight_at(config.kl, step)
        num_image_elements = x[0].numel()
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            kl = kl_loss(posterior, config.kl.convention, num_image_elements)
        terms["kl"] = kl.detach()
        if weight == 0:
            return ObjectiveResult(fidelity, terms, fidelity)
        if config.kl.free_bits > 0:
            kl = kl_loss(posterior, config.kl.convention, num_image_elements, free_bits=config.kl.free_bits)
        return ObjectiveResult(fidelity + weight * kl, terms, fidelity)
