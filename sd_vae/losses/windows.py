"""Windows of pictures and latents: training on several sizes, and a decoder that gives a tile what it gives the whole.

Tools that decode large latents in tiles blend them where they overlap. GroupNorm and attention take each tile for a
picture of its own, so that it comes out in another tone than the whole would. A decoder that was trained on it differs
less. Tiling by this package is exact and needs nothing of the kind (`sd_vae.tiling`).

Shapes: B batch, C channels, H W pixels, h w latent cells.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sd_vae.errors import UserError
from sd_vae.losses.config import TilingConfig
from sd_vae.losses.reconstruction import reconstruction_loss

__all__ = ["Window", "draw_crop", "draw_tile", "require_cells", "tile_loss"]

_CROP_STREAM, _TILE_STREAM = (4,), (5,)
"""Spawn keys beside that of `sd_vae.losses.equivariance`."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A square of latent cells, and the pixels that belong to them."""

    top: int
    """First row of cells."""
    left: int
    """First column of cells."""
    side: int
    """Cells of a side."""

    def __call__(self, x: Tensor, factor: int = 1) -> Tensor:
        """Return the part of x in the window, a view.

        Args:
            x: Latents (B, C, h, w), or pictures (B, C, H, W).
            factor: Pixels a latent cell; 1 for latents.
        """
        top, left, side = factor * self.top, factor * self.left, factor * self.side
        return x[..., top : top + side, left : left + side]


def draw_crop(min_cells: int, seed: int, step: int, num_cells: int) -> Window:
    """Return the window of the pictures that one optimizer step trains on, a pure function of its arguments.

    Args:
        min_cells: Smallest side; it is uniform from here to `num_cells`, and so is its place.
        seed: Seed of the run.
        step: Optimizer steps taken; all batches and processes of a step share the window.
        num_cells: Latent cells of a side.
    """
    return _draw(_CROP_STREAM, seed, step, min_cells, num_cells, num_cells)


def draw_tile(config: TilingConfig, seed: int, step: int, num_cells: int) -> Window:
    """Return the tile of one optimizer step, smaller than the whole; a pure function of its arguments.

    Args:
        config: Smallest share of a side, margin.
        seed: Seed of the run.
        step: Optimizer steps taken; all batches and processes of a step share the tile.
        num_cells: Latent cells of a side, as many as `require_cells` asks for.
    """
    smallest = max(round(config.min_scale * num_cells), 2 * config.margin + 1)
    return _draw(_TILE_STREAM, seed, step, min(smallest, num_cells - 1), num_cells - 1, num_cells)


def require_cells(config: TilingConfig, num_cells: int) -> None:
    """Check that latents of this many cells a side have a tile with something inside its margins.

    Raises:
        UserError: They are too small.
    """
    least = 2 * config.margin + 2
    if num_cells < least:
        raise UserError(
            f"loss.tiling with a margin of {config.margin} needs latents of at least {least}x{least} cells, these are "
            f"{num_cells}x{num_cells}; train on larger crops or lower loss.tiling.margin."
        )


def tile_loss(tile: Tensor, recon: Tensor, window: Window, *, factor: int, margin: int) -> Tensor:
    """Return how far a tile that was decoded by itself is from the same part of the whole: mean square, inside margins.

    What lies near a tile's edge is left out: no decoder can know what is beyond, and tools blend it away.

    Args:
        tile: Decoded window of the latents (B, 3, side * factor, side * factor).
        recon: Decoded whole (B, 3, H, W), taken as a constant: the tile learns from the whole, not the other way round.
        window: Where the tile lies.
        factor: Pixels a latent cell.
        margin: Cells at each edge of the tile that are left out.
    """
    inside = Window(top=margin, left=margin, side=window.side - 2 * margin)
    return reconstruction_loss(inside(tile, factor), inside(window(recon.detach(), factor), factor), "l2")


def _draw(stream: tuple[int, ...], seed: int, step: int, smallest: int, largest: int, num_cells: int) -> Window:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*stream, step)))
    side = int(rng.integers(smallest, largest + 1))
    top, left = (int(start) for start in rng.integers(0, num_cells - side + 1, size=2))
    return Window(top=top, left=left, side=side)
