"""What both models are given, and how they are called: tensor in, tensor out."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["caller", "random_input"]


def random_input(
    vae: Any, action: Literal["encode", "decode"], height: int, width: int, *, batch_size: int = 1
) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1], or latents (B, C, h, w), of the model's dtype and device; always the same.

    Args:
        vae: Our model.
        action: What is to be done with them.
        height: Pixels of the pictures, a multiple of the factor.
        width: Likewise.
        batch_size: Pictures.
    """
    generator = torch.Generator().manual_seed(0)
    if action == "encode":
        x = torch.rand(batch_size, vae.config.in_channels, height, width, generator=generator) * 2 - 1
    else:
        shape = batch_size, vae.config.latent_channels, height // vae.factor, width // vae.factor
        x = torch.randn(shape, generator=generator)
    return x.to(vae.device, vae.dtype)


def caller(vae: Any, action: Literal["encode", "decode"]) -> Callable[[Tensor], Tensor]:
    """Return a function from images to the posterior's moments, or from latents to images.

    Args:
        vae: Our model, or diffusers'.
        action: Which half.
    """
    if action == "encode":
        return lambda x: vae.encode(x, return_dict=False)[0].parameters
    return lambda z: vae.decode(z, return_dict=False)[0]
