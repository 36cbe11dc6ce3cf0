"""From a picture to a square training crop.

Shapes: S side of the crop in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_vae.images import to_tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

__all__ = ["center_crop", "random_resized_crop"]


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> Tensor:
    """Return a random square of a picture, resized to `size`.

    The square's side is uniform between `scale` times the shorter side of the picture, its place uniform over the
    picture. Sides below `size` are raised to it where the picture is large enough, so that no target is blurred by
    enlarging; smaller pictures are enlarged.

    Args:
        image: Picture, RGB.
        size: Side of the result, in pixels.
        scale: Smallest and largest side as a fraction of the shorter side.
        flip: Mirror with probability 1/2.
        rng: Source of four numbers.

    Returns:
        (3, S, S), float32 in [-1, 1].
    """
    shorter = min(image.size)
    floor = min(size, shorter)
    smallest, largest = (max(floor, round(fraction * shorter)) for fraction in scale)
    side = int(rng.integers(smallest, largest, endpoint=True))
    left = int(rng.integers(0, image.width - side, endpoint=True))
    top = int(rng.integers(0, image.height - side, endpoint=True))
    x = _square(image, left, top, side, size)
    mirrored = flip and rng.random() < 0.5
    return x.flip(-1) if mirrored else x


def center_crop(image: Image.Image, size: int) -> Tensor:
    """Return the largest centred square of a picture, resized to `size`: (3, S, S), float32 in [-1, 1]."""
    side = min(image.size)
    return _square(image, (image.width - side) // 2, (image.height - side) // 2, side, size)


def _square(image: Image.Image, left: int, top: int, side: int, size: int) -> Tensor:
    """A square of a picture, resized with antialiasing; copied bit for bit where side equals size."""
    from PIL import Image

    box = (left, top, left + side, top + side)
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))[0]
