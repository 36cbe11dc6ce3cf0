"""Heat maps to look at: where a picture is unlike normal ones, laid over the picture.

Shapes: H W pixels, h w latent cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["heat_map"]

OPACITY = 0.65
"""Of the heat over the picture's greys."""


def heat_map(x: Tensor, values: Tensor, value_range: tuple[float, float]) -> Image.Image:
    """Return a map over its picture: black where cells are as usual, bright where hardly a normal cell is like that.

    The colours are matplotlib's `inferno`, whose lightness grows evenly with the value.

    Args:
        x: Image (3, H, W) in [-1, 1].
        values: One of its maps (h, w).
        value_range: What is black and what is brightest, as `Detector.ranges` has it, so that pictures compare.
    """
    from matplotlib import colormaps
    from PIL import Image

    low, high = value_range
    level = ((values.double() - low) / max(high - low, 1e-12)).clamp(0.0, 1.0)
    sized = interpolate(level[None, None], size=x.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    heat = torch.from_numpy(colormaps["inferno"](sized.numpy())[..., :3].copy())  # (H, W, 3), 0 to 1
    grey = ((x.double().mean(dim=0) + 1.0) / 2.0)[..., None].expand(-1, -1, 3)
    mixed = OPACITY * heat + (1.0 - OPACITY) * grey
    return Image.fromarray((255.0 * mixed).round().clamp(0, 255).to(torch.uint8).numpy())
