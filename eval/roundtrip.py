"""A picture of any size through an autoencoder and back, as a user of the finished model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from sd_vae.errors import UserError
from sd_vae.images import crop, pad_to_factor, to_pil, to_tensor

from .models import Encoded, decode, encode, factor_of

__all__ = ["decode_picture", "encode_picture", "evaluating", "padded"]


def encode_picture(vae: Any, picture: Image.Image) -> Encoded:
    """Return the raw latents of a picture, padded by reflection to multiples of the factor.

    Args:
        vae: Any of `eval.models.AUTOENCODERS`; the picture follows its device and dtype.
        picture: Read as RGB.

    Returns:
        Latents of shape (1, C, h, w), h = ceil(H / factor), w = ceil(W / factor), and their posterior.
    """
    return encode(vae, padded(vae, picture))


def padded(vae: Any, picture: Image.Image) -> Tensor:
    """Return a picture as an autoencoder takes it: (1, 3, H, W) in [-1, 1], padded, on its device and in its dtype."""
    weight = next(vae.parameters())
    return pad_to_factor(to_tensor(picture), factor_of(vae)).to(weight.device, weight.dtype)


def decode_picture(
    vae: Any,
    z: Tensor,
    size: tuple[int, int],
    *,
    rounding: Literal["nearest", "down"] = "nearest",
    generator: torch.Generator | None = None,
) -> Image.Image:
    """Return raw latents as an 8-bit RGB picture: decoded, padding cropped off, clamped, rounded.

    Args:
        vae: Model the latents belong to.
        z: Raw latents (1, C, h, w).
        size: Width and height of the picture that was encoded, in pixels.
        rounding: How values become 8 bits; down is what tools do that cast floats to bytes.
        generator: As in `eval.models.decode`.

    Raises:
        UserError: The decoder gave values that are not finite.
    """
    width, height = size
    x = crop(decode(vae, z, generator), height, width)
    if not bool(x.isfinite().all()):
        raise UserError(
            f"decoding gave values that are not finite in {str(x.dtype).removeprefix('torch.')}; load the VAE in "
            "float32, and if it fails there too its weights are damaged."
        )
    if rounding == "down":
        x = ((x.float().clamp(-1.0, 1.0) + 1.0) / 2.0 * 255.0).floor() / 127.5 - 1.0
    return to_pil(x)


@contextmanager
def evaluating(vaes: Sequence[Any]) -> Iterator[None]:
    """Put models in eval mode, and back as they were."""
    modes = [vae.training for vae in vaes]
    try:
        for vae in vaes:
            vae.eval()
        yield
    finally:
        for vae, mode in zip(vaes, modes, strict=True):
            vae.train(mode)
