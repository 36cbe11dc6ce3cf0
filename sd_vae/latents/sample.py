"""New pictures: latents drawn from a prior, decoded.

What comes out is what the prior knows. An autoencoder alone generates photos only where training has made its latents
normal, and in one that is sharp it has not: see `sd_vae.latents.prior`. For photos, train a diffusion model on the
latents, as `examples/train_on_latents.py` does.

Shapes: C latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sd_vae.errors import UserError
from sd_vae.latents.prior import NormalPrior, Prior

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["Sample", "generator_of", "sample"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture that nobody took."""

    z: Tensor
    """What was drawn (C, h, w), raw, float32 on the CPU."""
    x: Tensor
    """What it decodes to (3, H, W), clamped to [-1, 1], float32 on the CPU."""


def sample(
    vae: AutoencoderKL,
    prior: Prior | None = None,
    *,
    num: int = 16,
    size: tuple[int, int] = (512, 512),
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[Sample]:
    """Yield pictures of latents drawn from a prior; picture k depends on (seed, k) alone.

    Args:
        vae: The decoder, on its device and in the dtype to compute in.
        prior: Where z comes from; N(0, I) by default.
        num: How many.
        size: Height and width in pixels, multiples of the VAE's factor.
        temperature: Factor of what departs from the prior's mean: below 1 calmer, above 1 wilder, 0 the mean itself.
        seed: Seed of the draws.

    Raises:
        UserError: A number out of range, a size that the VAE cannot make, or a prior of other channels.
    """
    channels = int(vae.config.latent_channels)
    source: Prior = NormalPrior(channels) if prior is None else prior
    if num < 1:
        raise UserError(f"num is {num}, it must be at least 1.")
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}, it must be a finite number of at least 0.")
    if min(size) < 1 or any(side % vae.factor for side in size):
        raise UserError(f"size is {size[0]}x{size[1]} pixels, both sides must be multiples of {vae.factor}.")
    if source.num_channels != channels:
        raise UserError(
            f"the prior is of {source.num_channels} latent channels, the VAE takes {channels}; fit it to latents of "
            "this VAE."
        )
    height, width = (side // vae.factor for side in size)
    generators = (generator_of(seed, "sample", index) for index in range(num))
    return (_decoded(vae, source.draw(height, width, temperature=temperature, generator=one)) for one in generators)


def generator_of(seed: int, *key: int | str) -> torch.Generator:
    """Return a generator on the CPU for one purpose and number, independent of all others."""
    digest = hashlib.blake2b(" ".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.no_grad()
def _decoded(vae: AutoencoderKL, z: Tensor) -> Sample:
    x = vae.decode(z[None].to(vae.device, vae.dtype)).sample[0]
    return Sample(z, x.float().cpu().clamp(-1.0, 1.0))
