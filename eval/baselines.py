"""Yardsticks that need no network: what a reconstruction has to beat."""

import numpy as np
from PIL import Image

from sd_vae.errors import UserError

__all__ = ["box_average"]


def box_average(image: Image.Image, block: int) -> Image.Image:
    """Return the picture with each block x block square replaced by its mean colour, as 8-bit RGB.

    Blocks are counted from the upper left; those cut by the right and bottom edges average the pixels they have.

    Args:
        image: Picture, read as RGB.
        block: Side of a block in pixels.

    Raises:
        UserError: `block` is below 1.
    """
    if block < 1:
        raise UserError(f"the side of a block is {block} pixels, it must be at least 1; use 16 or 32.")
    pixels = np.asarray(image.convert("RGB"), np.float64)
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], block)
        sizes = np.diff(starts, append=pixels.shape[axis])
        sums = np.add.reduceat(pixels, starts, axis=axis)
        means = sums / sizes.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        pixels = np.repeat(means, sizes, axis=axis)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))
