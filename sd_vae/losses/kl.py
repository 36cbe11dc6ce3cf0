"""The KL term: how far posteriors are from the prior N(0, I), and its weight over the steps.

Shapes: B batch, C latent channels, h w latent cells.
"""

from typing import Literal

from torch import Tensor

from sd_vae.losses.config import KLConfig
from sd_vae.posterior import DiagonalGaussian

__all__ = ["kl_loss", "kl_weight_at"]


def kl_loss(
    posterior: DiagonalGaussian,
    convention: Literal["mean", "ldm"],
    num_image_elements: int,
    *,
    free_bits: float = 0.0,
) -> Tensor:
    """Return KL(q(z|x) || N(0, I)) in nats, in fp32 at least, reduced to a scalar.

    With free bits, each channel of each image counts as max(free_bits, its mean over h, w) an element: what lies below
    costs nothing and has no gradient. The floor is per image, not per batch, so the term stays a mean over images and
    does not depend on how a batch is dealt out to devices.

    Args:
        posterior: Posterior over z, (B, C, h, w).
        convention: mean: mean over B, C, h, w. ldm: sum over C, h, w, divided by `num_image_elements`, mean over B.
        num_image_elements: 3HW of the images that were encoded; read by `ldm` alone.
        free_bits: Nats per latent element.
    """
    if free_bits > 0:
        per_channel = posterior.kl_map().mean(dim=(2, 3)).clamp(min=free_bits)  # (B, C)
        num_latent_elements = posterior.mean[0].numel()
        return per_channel.mean() * (1.0 if convention == "mean" else num_latent_elements / num_image_elements)
    if convention == "mean":
        return posterior.kl_map().mean()
    return posterior.kl().mean() / num_image_elements


def kl_weight_at(config: KLConfig, step: int | None) -> float:
    """Return the weight of the KL term after `step` optimizer steps; None is after all warm-up.

    Warm-up rises linearly from 0 to full at `warmup_steps`. A cycle rises so over its first half, stays full over the
    second, and begins anew.
    """
    if step is None:
        return config.weight
    if config.cycle_steps:
        return config.weight * min(1.0, 2.0 * (step % config.cycle_steps) / config.cycle_steps)
    if config.warmup_steps:
        return config.weight * min(1.0, step / config.warmup_steps)
    return config.weight
