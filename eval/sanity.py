"""Does the decoder use its latents? A decoder that does not scores the same from zeros or from another photo's latents.

Both numbers go beside the real PSNR; a healthy model loses many dB in each.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from sd_vae._diffusers import DiffusersAutoencoderKL
from sd_vae.errors import UserError

from .metrics import psnr_db
from .photos import Pictures, fit_photo, list_photos, read_photo
from .roundtrip import decode_picture, encode_picture, evaluating

__all__ = ["shuffled_latents_psnr_db", "zero_latents_psnr_db"]


def zero_latents_psnr_db(vae: DiffusersAutoencoderKL, data: Pictures, *, size: int | None = None) -> float:
    """Return the mean PSNR in dB of photos against what raw latents of zero decode to.

    Args:
        vae: Model.
        data: Pictures, as `evaluate` takes them.
        size: As in `evaluate`.

    Raises:
        UserError: There are no photos, or one cannot be read.
    """
    pictures, latents = _encode_all(vae, data, size)
    return _mean_psnr_db(vae, pictures, [torch.zeros_like(z) for z in latents])


def shuffled_latents_psnr_db(vae: DiffusersAutoencoderKL, data: Pictures, *, size: int | None = None) -> float:
    """Return the mean PSNR in dB of photos against what the next photo's latents decode to; the last takes the first's.

    Args:
        vae: Model.
        data: At least two photos of one size, as `evaluate` takes them.
        size: As in `evaluate`.

    Raises:
        UserError: Fewer than two photos, photos of different sizes, or one that cannot be read.
    """
    pictures, latents = _encode_all(vae, data, size)
    if len(pictures) < 2:
        raise UserError(f"latents are swapped between photos, and there is {len(pictures)}; give at least 2.")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise UserError(
            f"latents are swapped between photos of one size, these have {len(sizes)}; give a size to resize them to."
        )
    return _mean_psnr_db(vae, pictures, [*latents[1:], latents[0]])


def _encode_all(
    vae: DiffusersAutoencoderKL, data: Pictures, size: int | None
) -> tuple[list[Image.Image], list[Tensor]]:
    """Photos and the modes of their posteriors."""
    pictures = [fit_photo(read_photo(photo), size) for photo in list_photos(data)]
    with evaluating([vae]):
        return pictures, [encode_picture(vae, picture).z for picture in pictures]


def _mean_psnr_db(vae: DiffusersAutoencoderKL, pictures: list[Image.Image], latents: list[Tensor]) -> float:
    """Mean PSNR of pictures against decoded latents."""
    with evaluating([vae]):
        scores = [
            psnr_db(decode_picture(vae, z, picture.size), picture) for z, picture in zip(latents, pictures, strict=True)
        ]
    return math.fsum(scores) / len(scores)
