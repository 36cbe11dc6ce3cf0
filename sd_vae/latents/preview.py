"""Looking at a store: pictures through the decoder on one sheet, and colours straight from latents by a matrix.

A linear preview is what samplers show while they run: one RGB pixel a latent cell, a sum of the channels and a bias,
fitted to what the decoder gives. ComfyUI keeps these numbers in its latent formats and applies them to scaled latents
with a result in [-1, 1]; so do we.

Source: form and range of Comfy-Org/ComfyUI@v0.3.48:comfy/latent_formats.py and latent_preview.py.

Shapes: C latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool2d, interpolate

from sd_vae.checkpoints.families import latent_scale
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.images import to_pil
from sd_vae.latents.dataset import LatentDataset
from sd_vae.latents.store import LatentStore

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["LinearPreview", "Preview", "PreviewFit", "contact_sheet", "fit_linear_preview", "preview"]

HELD_OUT_EVERY = 4
"""Of so many pictures one is kept from the fit, to measure it on."""

GAP = 4
"""Pixels between the pictures of a sheet."""


@dataclass(frozen=True)
class LinearPreview:
    """Colours of scaled latents as a sum of their channels."""

    factors: tuple[tuple[float, float, float], ...]
    """What each channel adds to red, green and blue, C rows."""
    bias: tuple[float, float, float]
    """Red, green and blue of latents of 0."""

    def __call__(self, latents: Tensor) -> Tensor:
        """Return the picture (3, h, w) in [-1, 1] of scaled latents (C, h, w)."""
        factors, bias = (latents.new_tensor(values) for values in (self.factors, self.bias))
        return (torch.einsum("chw,ck->khw", latents, factors) + bias[:, None, None]).clamp(-1.0, 1.0)

    def comfyui(self) -> str:
        """Return the two lines of Python that a ComfyUI latent format has."""
        rows = ",\n".join(f"    [{_row(row)}]" for row in self.factors)
        factors = f"latent_rgb_factors = [\n    #   R        G        B\n{rows},\n]"
        return f"{factors}\nlatent_rgb_factors_bias = [{_row(self.bias)}]"


@dataclass(frozen=True, kw_only=True)
class PreviewFit:
    """A linear preview and how near it comes to the decoder, on pictures that it was not fitted to."""

    preview: LinearPreview
    """The preview."""
    r2: float
    """Share of the variance of the decoder's colours, averaged over each cell's pixels, that the preview has; at most
    1, over all colours and cells."""
    psnr_db: float
    """PSNR in dB to these colours in [0, 1]; mean of the pictures' own."""
    num_fitted: int
    """Pictures that it was fitted to."""
    num_held_out: int
    """Other pictures that it was measured on."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Some items of a store as pictures."""

    indices: tuple[int, ...]
    """Numbers of the items in `LatentDataset`."""
    decoded: tuple[Image.Image, ...]
    """Through the decoder."""
    linear: tuple[Image.Image, ...]
    """Through the linear preview, each cell enlarged to the square of pixels that it stands for."""
    fit: PreviewFit
    """The linear preview."""


def preview(
    folder: Path | str,
    vae: AutoencoderKL,
    *,
    num_pictures: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Preview:
    """Return items of a store, drawn at random, through the decoder and through a linear preview fitted to them.

    Latents are the posterior's mean, or what a store of samples holds. The scale is the VAE's.

    Args:
        folder: The store.
        vae: A VAE whose encoder made the store.
        num_pictures: Items to draw, at least 2; all where there are fewer.
        seed: Which.
        progress: Called with the pictures decoded so far and their number.

    Raises:
        UserError: No finished store, fewer than 2 items, or latents of another number of channels.
    """
    held = LatentStore.open(Path(folder)).description.content
    dataset = LatentDataset(folder, content="sample" if held == "sample" else "mode", columns=())
    channels, wanted = dataset.description.vae.latent_channels, int(vae.config.latent_channels)
    if channels != wanted:
        raise UserError(
            f"{folder} holds latents of {channels} channels, the VAE takes {wanted}; give the VAE it is of."
        )
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_pictures].sort().values
    latents, pictures, decoded = [], [], []
    scales, shifts = (torch.tensor(values).view(-1, 1, 1) for values in latent_scale(_config(vae)))
    for number, index in enumerate(chosen.tolist(), start=1):
        z = dataset.sample(index)
        with torch.no_grad():
            x = vae.decode(z[None].to(vae.device, vae.dtype)).sample[0].float().cpu().clamp(-1.0, 1.0)
        latents.append((z - shifts) * scales)
        pictures.append(avg_pool2d(x, vae.factor))
        decoded.append(to_pil(x[None]))
        if progress is not None:
            progress(number, len(chosen))
    fit = fit_linear_preview(latents, pictures)
    linear = [interpolate(fit.preview(one)[None], scale_factor=vae.factor, mode="nearest") for one in latents]
    return Preview(indices=tuple(chosen.tolist()), decoded=tuple(decoded), linear=tuple(map(to_pil, linear)), fit=fit)


def fit_linear_preview(latents: Sequence[Tensor], pictures: Sequence[Tensor]) -> PreviewFit:
    """Return the matrix that gives the pictures' colours from latents with the least squared error, in float64.

    Every fourth picture is kept from the fit and measured on.

    Args:
        latents: Scaled latents (C, h, w), one a picture.
        pictures: What they decode to, averaged over each cell's pixels, (3, h, w) in [-1, 1].

    Raises:
        UserError: Fewer than 2 pictures.
    """
    if len(latents) < 2:
        raise UserError(
            f"a linear preview needs at least 2 pictures, one to fit and one to measure on, and there are "
            f"{len(latents)}; take more."
        )
    # The last of every four; of two or three, the last.
    held_out = {*range(HELD_OUT_EVERY - 1, len(latents), HELD_OUT_EVERY)} or {len(latents) - 1}
    fitted = [index for index in range(len(latents)) if index not in held_out]
    design = torch.cat([_cells(latents[index]) for index in fitted])
    design = torch.cat([design, torch.ones_like(design[:, :1])], dim=1)
    colours = torch.cat([_cells(pictures[index]) for index in fitted])
    # gelsd: also right where a channel is constant and the solution not unique
    solution = torch.linalg.lstsq(design, colours, driver="gelsd").solution  # (C + 1, 3)
    *factors, bias = ((red, green, blue) for red, green, blue in solution.tolist())
    linear = LinearPreview(tuple(factors), bias)
    shown = [(_cells(linear(latents[index].double())), _cells(pictures[index])) for index in sorted(held_out)]
    errors = [(ours - theirs).square() for ours, theirs in shown]
    truth = torch.cat([theirs for _, theirs in shown])
    residual, total = torch.cat(errors).sum(), (truth - truth.mean(dim=0)).square().sum()
    levels = [-10.0 * torch.log10(error.mean() / 4.0) for error in errors]  # /4: from [-1, 1] to [0, 1]
    return PreviewFit(
        preview=linear,
        r2=float(1.0 - residual / total),
        psnr_db=float(torch.stack(levels).mean()),
        num_fitted=len(fitted),
        num_held_out=len(held_out),
    )


def contact_sheet(pictures: Sequence[Image.Image], *, columns: int | None = None, side: int = 256) -> Image.Image:
    """Return pictures in a grid on white, row by row, each fitted into a square and never enlarged.

    Args:
        pictures: At least one.
        columns: Pictures in a row; by default so many that the sheet is about square.
        side: Largest side of the square in pixels.
    """
    from PIL import Image

    columns = columns or max(1, round(len(pictures) ** 0.5))
    cell = min(side, max(max(picture.size) for picture in pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + GAP) - GAP, rows * (cell + GAP) - GAP), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        small = picture.copy()
        small.thumbnail((cell, cell), Image.Resampling.BOX)
        left, top = ((cell - length) // 2 for length in small.size)
        sheet.paste(small, (column * (cell + GAP) + left, row * (cell + GAP) + top))
    return sheet


def _cells(values: Tensor) -> Tensor:
    """(channels, h, w) as (cells, channels) in float64."""
    return values.double().flatten(1).T


def _config(vae: AutoencoderKL) -> VAEConfig:
    return VAEConfig.from_dict(dict(vae.config), source="the VAE's config")


def _row(values: Sequence[float]) -> str:
    return ", ".join(f"{value:7.4f}" for value in values)
