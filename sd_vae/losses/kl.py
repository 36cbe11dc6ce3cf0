"""The KL term: how far posteriors are from the prior N(0, I).

Shapes: B batch, C latent channels, h w latent cells.
"""

from typing import Literal

from torch import Tensor

from sd_vae.posterior import DiagonalGaussian

__all__ = ["kl_loss"]


def kl_loss(posterior: DiagonalGaussian, convention: Literal["mean", "ldm"], num_image_elements: int) -> Tensor:
    """Return KL(q(z|x) || N(0, I)) in nats, in fp32, reduced to a scalar.

    Args:
        posterior: Posterior over z, (B, C, h, w).
        convention: mean: mean over B, C, h, w. ldm: sum over C, h, w, divided by `num_image_elements`, mean over B.
        num_image_elements: 3HW of the images that were encoded; read by `ldm` alone.
    """
    if convention == "mean":
        return posterior.kl_map().mean()
    return posterior.kl().mean() / num_image_elements
