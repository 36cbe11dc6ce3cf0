"""The parts of a training step; foremost what Accelerate wraps, so that gradients are synchronised and autocast works.

diffusers' `forward` returns only the picture, which tempts trainers to call `encode` and `decode` on the unwrapped
model; several devices then train apart from each other, silently. Here everything that needs a gradient is in one
`forward`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.losses import OutputLogvar, Similarity, Window, draw_crop, draw_similarity, draw_tile
from sd_vae.losses.equivariance import IDENTITY
from sd_vae.posterior import DiagonalGaussian

from .config import TrainConfig

__all__ = ["Geometry", "Means", "TrainingForward", "draw_geometry", "synchronised"]


class Geometry(NamedTuple):
    """What a step does to the places of pixels and latent cells, alike for all its batches and processes."""

    crop: Window | None = None
    """Part of the pictures that the step trains on; None is all of them."""
    similarity: Similarity = IDENTITY
    """Turns and scales pictures and latents."""
    tile: Window | None = None
    """Part of the latents that is decoded by itself too."""


def draw_geometry(config: TrainConfig, step: int, factor: int) -> Geometry:
    """Return the geometry of one optimizer step, a pure function of its arguments.

    Args:
        config: The run.
        step: Optimizer steps taken before.
        factor: Pixels a latent cell.
    """
    num_cells = config.data.size // factor
    crop = None
    if config.data.min_size is not None:
        crop = draw_crop(-(-config.data.min_size // factor), config.seed, step, num_cells)
        num_cells = crop.side
    similarity = draw_similarity(config.loss.equivariance, config.seed, step, num_cells)
    num_cells = max(1, round(similarity.scale * num_cells))
    tile = draw_tile(config.loss.tiling, config.seed, step, num_cells) if config.loss.tiling.weight else None
    return Geometry(crop, similarity, tile)


class TrainingForward(nn.Module):
    """x and posterior noise to reconstruction and posterior, in one differentiable call.

    Args:
        vae: Model.
        output: The objective's learned log-variance where it has one; a part of this module only so that its gradient
            is averaged over processes with the others.
    """

    def __init__(self, vae: AutoencoderKL, output: OutputLogvar | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.output = output

    def forward(
        self, x: Tensor, noise: Tensor, similarity: Similarity = IDENTITY, tile: Window | None = None
    ) -> tuple[Tensor, DiagonalGaussian] | tuple[Tensor, DiagonalGaussian, Tensor]:
        """Return the reconstruction of a posterior sample, and the posterior.

        Args:
            x: Images (B, 3, H, W) in [-1, 1].
            noise: eps ~ N(0, I), (B, C, h, w); an argument, so that a step is a function of its inputs.
            similarity: Turns and scales the sample before it is decoded.
            tile: Part of the sample that is decoded once more, by itself.

        Returns:
            recon (B, 3, H, W) (or turned and scaled), not clamped, and the posterior, its moments in fp32 at least also
            under autocast; with `tile` also the decoded tile.
        """
        (posterior,) = self.vae.encode(x, return_dict=False)
        moments = posterior.parameters
        posterior = DiagonalGaussian(moments.to(torch.promote_types(moments.dtype, torch.float32)))
        z = similarity(posterior.sample(noise=noise))
        (recon,) = self.vae.decode(z, return_dict=False)
        if tile is None:
            return recon, posterior
        (decoded_tile,) = self.vae.decode(tile(z), return_dict=False)
        return recon, posterior, decoded_tile


class Means:
    """Running means of named terms over the batches of a step, without gradient.

    Args:
        num_batches: Batches of the step.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self.values: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of one batch."""
        for name, value in terms.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach() / self.num_batches


def synchronised(accelerator: Accelerator, module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Return a context for forward and backward pass: gradients are averaged over processes in the last batch alone."""
    return nullcontext() if is_last else accelerator.no_sync(module)
