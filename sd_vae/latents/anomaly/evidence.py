"""What a VAE makes of pictures, cell by cell: where it fails to reconstruct, and how unlikely its latents are.

A VAE that has seen normal pictures reconstructs what is unlike them worse, and gives it unusual latents. Each map says
so in its own way; none of them knows yet how large its numbers are in normal pictures, `detector` learns that.

Shapes: B pictures, C latent channels, H W pixels, h w latent cells, f = H / h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, pad, unfold

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.losses.perceptual import LPIPS

__all__ = ["Evidence", "Seen", "look", "windows"]

SSIM_WINDOW = 11
"""Pixels across the Gaussian window of SSIM, as in the paper."""


class Seen(NamedTuple):
    """Pictures with what the VAE made of them."""

    x: Tensor
    """(B, 3, H, W) in [-1, 1]."""
    recon: Tensor
    """(B, 3, H, W), decoded from the posterior's mean, clamped to [-1, 1]."""
    mean: Tensor
    """(B, C, h, w), raw z."""
    rate: Tensor
    """(B, h, w), KL(q(z|x) || N(0, I)) in nats, summed over C."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Maps of one batch, all (B, h, w) in float32 on the CPU but `mean`."""

    mean: Tensor
    """(B, C, h, w), raw z."""
    pixel: Tensor
    """Mean squared error of the cell's pixels, over RGB, images in [-1, 1]."""
    colour: Tensor
    """The part of `pixel` that changes colour and not brightness."""
    structure: Tensor
    """1 - SSIM, mean over RGB and the cell's pixels; 0 to 2."""
    lpips: Tensor | None
    """LPIPS of the cell, summed over layers; None where no network was given."""
    rate: Tensor
    """KL to N(0, I) in nats, sum over C."""
    contrast: Tensor
    """Mean squared step of z to the cells on the right and below, over C: how much happens in the picture."""

    def __len__(self) -> int:
        """Return B."""
        return len(self.pixel)


@torch.inference_mode()
def look(vae: AutoencoderKL, x: Tensor) -> Seen:
    """Return what the VAE makes of pictures.

    Args:
        vae: The model, in eval mode, on any device and in any dtype.
        x: Images (B, 3, H, W) in [-1, 1]; H and W divisible by `vae.factor`.

    Raises:
        UserError: As `vae.encode`.
    """
    posterior = vae.encode(x.to(vae.device, vae.dtype)).latent_dist
    recon = vae.decode(posterior.mean).sample
    return Seen(
        x=x.float().cpu(),
        recon=recon.float().clamp(-1.0, 1.0).cpu(),
        mean=posterior.mean.float().cpu(),
        rate=posterior.kl_map().sum(dim=1).cpu(),
    )


@torch.inference_mode()
def weigh(seen: Seen, perceptual: LPIPS | None = None) -> Evidence:
    """Return the maps of what was seen.

    Args:
        seen: As `look` returns it.
        perceptual: LPIPS with real weights, on the CPU; None leaves its map out.

    Raises:
        UserError: The pictures are smaller than SSIM's window or than LPIPS takes.
    """
    x, recon, mean = seen.x, seen.recon, seen.mean
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise UserError(
            f"pictures of {x.shape[-2]}x{x.shape[-1]} pixels are smaller than SSIM's window of {SSIM_WINDOW}; use "
            "larger ones."
        )
    cells = mean.shape[-2:]
    error = recon - x
    brightness = error.mean(dim=1).square()  # (B, H, W), of three channels that change alike
    pixel = _pool(error.square().mean(dim=1), cells)
    right = pad(mean.diff(dim=3).square().mean(dim=1), (0, 1))
    below = pad(mean.diff(dim=2).square().mean(dim=1), (0, 0, 0, 1))
    return Evidence(
        mean=mean,
        pixel=pixel,
        colour=(pixel - _pool(brightness, cells)).clamp_min(0.0),
        structure=_pool(_dissimilarity(recon, x), cells),
        lpips=None if perceptual is None else _perceptual_map(perceptual, recon, x, cells),
        rate=seen.rate,
        contrast=right + below,
    )


def windows(mean: Tensor) -> Tensor:
    """Return each cell of latents (B, C, h, w) with its eight neighbours as a vector, (B, h w, 9 C).

    At the border the nearest cell stands for what is outside.
    """
    return unfold(pad(mean, (1, 1, 1, 1), mode="replicate"), kernel_size=3).transpose(1, 2)


def _pool(values: Tensor, cells: torch.Size) -> Tensor:
    """Means over the pixels of each cell, (B, h, w), of values (B, H, W)."""
    return adaptive_avg_pool2d(values[:, None], (cells[0], cells[1]))[:, 0]


def _dissimilarity(recon: Tensor, x: Tensor) -> Tensor:
    """1 - SSIM of each pixel, mean over RGB, (B, H, W)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(
        recon, x, kernel_size=SSIM_WINDOW, sigma=1.5, data_range=2.0, return_full_image=True, reduction="none"
    )
    return 1.0 - found[1].mean(dim=1)


def _perceptual_map(perceptual: LPIPS, recon: Tensor, x: Tensor, cells: torch.Size) -> Tensor:
    """LPIPS over latent cells: the maps of its layers, brought to one size and added; their mean is LPIPS, nearly."""
    perceptual.require_size(*x.shape[-2:])
    layers = perceptual.cell_distances(recon, x)
    sized = [interpolate(each[:, None], size=cells, mode="bilinear", align_corners=False)[:, 0] for each in layers]
    return torch.stack(sized).sum(dim=0)
