"""Numbers as pictures: where a reconstruction errs, what latents look like, pictures side by side.

Shapes: H W pixels, C latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

__all__ = ["ERROR_CEILING", "error_map", "latent_channels", "latent_colours", "side_by_side", "stacked"]

ERROR_CEILING = 64
"""Difference in 8-bit levels that the error map shows at its brightest; the same for every picture, so they compare."""

ROBUST_PERCENTILES = (1.0, 99.0)
"""What a latent channel's black and white stand for: single extreme cells must not flatten the picture."""

TILES_IN_A_ROW = 4
"""Channel tiles beside each other."""

TILE_GAP = 2
"""Latent cells between channel tiles."""


def error_map(recon: Image.Image, x: Image.Image) -> Image.Image:
    """Return where two pictures differ: |difference|, mean over RGB, 0 black to `ERROR_CEILING` levels and more bright.

    The colours are matplotlib's `inferno`, whose lightness grows evenly with the value.
    """
    from matplotlib import colormaps

    difference = np.abs(np.asarray(recon.convert("RGB"), np.float64) - np.asarray(x.convert("RGB"), np.float64))
    level = np.clip(difference.mean(axis=2) / ERROR_CEILING, 0.0, 1.0)
    return Image.fromarray(colormaps["inferno"](level, bytes=True)[..., :3].copy())


def latent_channels(z: Tensor) -> Image.Image:
    """Return each channel of raw latents (1, C, h, w) as a grey tile of one pixel a cell, four in a row, gaps clear.

    Black and white are the channel's own 1st and 99th percentile in this photo.
    """
    channels = _to_numpy(z)
    height, width = (size + TILE_GAP for size in channels.shape[1:])
    columns = min(len(channels), TILES_IN_A_ROW)
    rows = -(-len(channels) // columns)
    sheet = Image.new("LA", (columns * width - TILE_GAP, rows * height - TILE_GAP))
    for index, channel in enumerate(channels):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(_stretch(channel)).convert("LA"), (column * width, row * height))
    return sheet


def latent_colours(z: Tensor) -> Image.Image:
    """Return raw latents (1, C, h, w), C >= 3, as one colour picture of one pixel a cell.

    Red, green and blue are the first three principal components of this photo's cells, each stretched between its 1st
    and 99th percentile. Similar colours are similar latents; the colours themselves mean nothing.
    """
    values = _to_numpy(z)
    cells = values.reshape(len(values), -1)
    cells = cells - cells.mean(axis=1, keepdims=True)
    _, axes = np.linalg.eigh(cells @ cells.T)  # ascending
    axes = axes[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary; its largest entry is made positive, so that the same latents look the same.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(3)])
    components = (axes.T @ cells).reshape(3, *values.shape[1:])
    return Image.fromarray(np.stack([_stretch(component) for component in components], axis=-1))


def side_by_side(pictures: Sequence[Image.Image], *, gap: int = 8) -> Image.Image:
    """Return pictures in a row, their tops aligned, on white with `gap` pixels between them."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    strip = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + gap
    return strip


def stacked(pictures: Sequence[Image.Image], *, gap: int = 8) -> Image.Image:
    """Return pictures below each other, their left sides aligned, on white with `gap` pixels between them."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def _to_numpy(z: Tensor) -> np.ndarray:
    """(C, h, w) in float64."""
    return z[0].detach().to("cpu").double().numpy()


def _stretch(values: np.ndarray) -> np.ndarray:
    """Values between their robust percentiles as 8-bit grey; a constant is mid-grey."""
    low, high = np.percentile(values, ROBUST_PERCENTILES)
    level = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    return np.rint(np.clip(level, 0.0, 1.0) * 255.0).astype(np.uint8)
