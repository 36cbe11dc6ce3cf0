"""A picture of any size through a VAE and back, as a user of the finished model sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from sd_vae._diffusers import DiagonalGaussianDistribution, DiffusersAutoencoderKL
from sd_vae.errors import UserError
from sd_vae.images import crop, pad_to_factor, to_pil, to_tensor

__all__ = ["decode_picture", "encode_picture", "evaluating"]


@torch.inference_mode()
def encode_picture(vae: DiffusersAutoencoderKL, picture: Image.Image) -> DiagonalGaussianDistribution:
    """Return the posterior over raw latents of a picture, padded by reflection to multiples of the factor.

    Args:
        vae: Ours or diffusers' own; the picture follows its device and dtype.
        picture: Read as RGB.

    Returns:
        Posterior of shape (1, C, h, w), h = ceil(H / factor), w = ceil(W / factor).
    """
    weight = next(vae.parameters())
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # diffusers' class has no `factor`
    x = pad_to_factor(to_tensor(picture), factor).to(weight.device, weight.dtype)
    return vae.encode(x).latent_dist


@torch.inference_mode()
def decode_picture(vae: DiffusersAutoencoderKL, z: Tensor, size: tuple[int, int]) -> Image.Image:
    """Return raw latents as an 8-bit RGB picture: decoded, padding cropped off, clamped, rounded.

    Args:
        vae: Model the latents belong to.
        z: Raw latents (1, C, h, w).
        size: Width and height of the picture that was encoded, in pixels.

    Raises:
        UserError: The decoder gave values that are not finite.
    """
    width, height = size
    x = crop(vae.decode(z).sample, height, width)
    if not bool(x.isfinite().all()):
        raise UserError(
            f"decoding gave values that are not finite in {str(x.dtype).removeprefix('torch.')}; load the VAE in "
            "float32, and if it fails there too its weights are damaged."
        )
    return to_pil(x)


@contextmanager
def evaluating(vaes: list[DiffusersAutoencoderKL]) -> Iterator[None]:
    """Put models in eval mode, and back as they were."""
    modes = [vae.training for vae in vaes]
    try:
        for vae in vaes:
            vae.eval()
        yield
    finally:
        for vae, mode in zip(vaes, modes, strict=True):
            vae.train(mode)
